"""Helpers of the tests."""

import os

# numpy brings OpenBLAS, whose threads spin for a while after each import: a quarter of a short program's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
