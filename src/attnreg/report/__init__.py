"""Traces, fair baselines and figures for the demo and the benchmarks."""
