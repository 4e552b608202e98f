"""What a populate call takes from which limit, and the watch that stops it before a limit does.

How the needs are counted, and why, is in ``docs/design/headroom.md``.
"""

from prefault.needs.parts import Part, SpreadPart, missing_from, parts_of
from prefault.needs.spare import spare
from prefault.needs.watch import Shortage, Watch

__all__ = ["Part", "Shortage", "SpreadPart", "Watch", "missing_from", "parts_of", "spare"]
