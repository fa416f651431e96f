"""Averaging optimizers inside others' trainers and checkpoints; each module needs its framework."""
