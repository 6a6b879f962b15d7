"""What a run writes: folder, checkpoints, metrics, samples, report."""
