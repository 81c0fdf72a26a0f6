"""Evaluation: feature extractors, metrics, bootstrap intervals, class agreement, memorization."""
