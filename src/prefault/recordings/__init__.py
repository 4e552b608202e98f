"""Recordings of the pages that a program touched, and snapshots of what is cached: saved, and brought back."""
