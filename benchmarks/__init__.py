"""Benchmarks of attnreg against the optimisers that people would otherwise use.

`python -m benchmarks` runs them all; each writes one JSON file under `benchmarks/results/`.
"""
