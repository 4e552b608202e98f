"""The populate call and its relatives: plan, run in chunks, diagnose, roll back; discard; lock."""
