"""The process that runs a device's driver: it answers faults and requests."""
