"""What replay costs and keeps: `python -m benchmarks`, from the root of a checkout."""
