"""Stages: each reads artifact folders and writes one; experiment files run several."""
