"""Shared memory of multiprocessing that raises where the standard class would die by SIGBUS."""
