"""Remote files as device memory."""
