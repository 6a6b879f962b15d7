"""Benchmarks of the trainer: rollout, training pass, whole step, scaling over ranks."""
