"""What is populated now: the result, and the ways to scan."""
