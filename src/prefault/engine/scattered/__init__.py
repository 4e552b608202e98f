"""Populating many ranges that are scattered in memory, without an object for each of them."""
