"""Scored rollouts to optimizer steps: advantages, packed batches, loss, update."""
