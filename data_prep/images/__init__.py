"""Image files of any kind to small JPEGs without metadata; hashes, and which are copies of one another."""
