"""Benchmarks: each variant against the plain way of computing the same."""
