"""Benchmarks by lm-evaluation-harness, and metrics of generated texts during `fit`."""
