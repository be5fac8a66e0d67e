"""Timing tables that ship with the package: one JSON file a GPU, written by benchmarks/gpu_run.py --tune."""
