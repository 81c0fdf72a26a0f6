"""Runs: typed configurations, checkpoints, the trainer and the stages of the pipeline."""
