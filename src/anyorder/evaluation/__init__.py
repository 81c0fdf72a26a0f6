"""Measuring and showing generated images: feature extractors, metrics, figures and the report."""
