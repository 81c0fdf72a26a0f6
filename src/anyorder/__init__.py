"""Generate images in the order that the image itself asks for."""

__version__ = "0.1.0"
