"""Tests use one thread: tiny tensors are fastest so, and bits do not depend on the machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
