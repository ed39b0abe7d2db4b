"""Where weights and channels of a network go: one forward pass, looked at operator by operator."""
