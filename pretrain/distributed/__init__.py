"""Collectives (comm.py), the launchers' environments, and the engines: DeepSpeed, and the plain-torch twin."""
