"""Data: sources of images, the image reader, captions, a procedural data set, and cached arrays."""
