"""Training: the one trainer, its checkpoints, low-rank updates, orders extracted while training."""
