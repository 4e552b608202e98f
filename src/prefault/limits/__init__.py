"""Every limit that may stop or kill a populate call, what a call demands from it, and admission control between the two.

The limits are the rows of ``prefault.limits.table``. A reading holds for a moment only. Which memory counts as reclaimable,
and why, is in ``docs/design/headroom.md``.
"""
