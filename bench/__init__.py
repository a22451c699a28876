"""Benchmarks: how fast, how much memory, and whether the labels still agree."""
