"""Runs compared: tables, statistics, choices, figures."""
