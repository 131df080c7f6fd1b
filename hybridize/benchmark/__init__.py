"""Speed benchmarks of checkpoints."""
