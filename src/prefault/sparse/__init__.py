"""Sparse memory: a large reservation of which parts are populated and discarded at will."""

from prefault.sparse.books import Books
from prefault.sparse.memory import SparseMemory

__all__ = ["Books", "SparseMemory"]
