"""Memory of others: any buffer and its addresses, what is mapped there, and what memory comes from."""

from prefault.memory.borrowing import Borrowed, borrow

__all__ = ["Borrowed", "borrow"]
