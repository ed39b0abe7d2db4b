"""Commands: what a person types, and the only place that prints."""
