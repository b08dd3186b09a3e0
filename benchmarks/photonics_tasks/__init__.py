"""What the photonic benchmarks share: tasks with data, networks and training, and published figures to compare with."""
