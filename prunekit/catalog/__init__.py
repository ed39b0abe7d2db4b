"""What plugins declare, and what is installed; no torch."""
