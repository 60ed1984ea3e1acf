"""Which row becomes a sample, and of which split."""
