"""Memory that prefault maps and unmaps itself."""
