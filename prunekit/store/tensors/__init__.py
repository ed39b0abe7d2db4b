"""Files of tensors: those that prunekit writes, and what it reads of other programs."""
