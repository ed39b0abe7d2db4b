"""What is on disk, and its only reader and writer."""
