"""From raw image-text pairs to WebDataset shards. No torch here: it runs on a CPU node."""
