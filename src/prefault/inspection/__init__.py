"""Residency: the state of the pages of any memory, and the kernel interfaces that tell it."""
