"""Tokenizers: images to grids of codebook indices and back, and the losses that train them."""
