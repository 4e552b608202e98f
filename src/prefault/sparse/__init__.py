"""Sparse memory: a large reservation whose blocks are populated and discarded at will."""

from prefault.sparse.accounting import Accounting
from prefault.sparse.sparse_memory import SparseMemory

__all__ = ["Accounting", "SparseMemory"]
