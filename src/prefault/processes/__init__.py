"""The memory of running processes: what is present, and bringing it in."""
