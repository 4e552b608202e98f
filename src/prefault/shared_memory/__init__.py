"""Shared memory of multiprocessing that raises where the standard class would die by SIGBUS."""

from prefault.shared_memory.named_memory import SharedMemory
from prefault.shared_memory.standard_guard import SharedMemoryProtection, protect_shared_memory

__all__ = ["SharedMemory", "SharedMemoryProtection", "protect_shared_memory"]
