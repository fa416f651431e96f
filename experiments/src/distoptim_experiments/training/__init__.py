"""Data, models and the training loop behind `distoptim train` and `distoptim compare`."""
