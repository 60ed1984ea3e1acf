"""From a manifest to batches: the sample order, the reader, the transforms, the texts of a batch."""
