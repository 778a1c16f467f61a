"""Benchmarks: `pytest bench`, `python -m bench.cpu`, `python -m bench.gpu_check`."""
