"""Sparse execution on a CPU."""
