"""Objectives: which features a term needs, which loss it calls, how its parts add up over ranks."""
