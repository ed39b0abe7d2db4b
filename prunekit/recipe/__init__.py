"""TOML to a plan, every mistake with its line; no torch."""
