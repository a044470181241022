"""Measurements that take too long for a test; `python -m benchmarks` writes RESULTS.md."""
