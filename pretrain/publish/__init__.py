"""Export of a checkpoint to a folder that open_clip loads."""
