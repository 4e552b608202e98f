"""Arrays on memory that is populated from the start, and loops that must not fault."""

from prefault.arrays.creation import empty, full, zeros
from prefault.arrays.fault_free import ReadyMemory, ready

__all__ = ["ReadyMemory", "empty", "full", "ready", "zeros"]
