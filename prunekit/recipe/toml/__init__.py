"""Recipes as they are written: TOML with its lines, addresses in it, its sections and sweeps."""
