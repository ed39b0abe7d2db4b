"""Files and arrays to batches."""
