"""The process that runs a driver: it answers page faults and requests."""
