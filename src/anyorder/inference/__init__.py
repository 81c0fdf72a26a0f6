"""Inference: pipelines, inpainting, loading and converting weights, the device."""
