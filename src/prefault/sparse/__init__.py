"""Sparse memory: a large reservation of which parts are populated and discarded at will."""

from prefault.sparse.accounting import Books
from prefault.sparse.sparse_memory import SparseMemory

__all__ = ["Books", "SparseMemory"]
