"""Time: when to launch, when to merge, and what is in flight."""
