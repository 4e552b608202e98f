"""The memory of running processes: what is present, and bringing it in.

import os, prefault

status = prefault.processes.status(4711)
result = prefault.processes.warm(4711, "[heap]")
"""

from prefault.processes.process_status import MappingStatus, ProcessStatus, status
from prefault.processes.process_warming import ProcessWarmResult, SkippedMapping, warm

__all__ = ["MappingStatus", "ProcessStatus", "ProcessWarmResult", "SkippedMapping", "status", "warm"]
