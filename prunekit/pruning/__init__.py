"""Scores to masks to a pruned network."""
