"""Training: data, losses, optimizers, and what is written back."""
