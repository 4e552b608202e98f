"""Populating in the background: a thread that does it, and a task that waits for it."""
