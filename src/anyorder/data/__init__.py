"""Images in, caches out: sources, decoding, a procedural data set, and readers."""
