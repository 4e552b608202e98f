"""The benchmark of device memory: five routes to populated pages."""
