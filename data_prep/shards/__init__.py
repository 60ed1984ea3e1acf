"""Samples, and the tars, index and manifest that they go into."""
