"""Collectives (comm.py) and the engines (engine.py): DeepSpeed, and the plain-torch twin."""
