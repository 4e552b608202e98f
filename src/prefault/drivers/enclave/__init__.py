"""An enclave page cache as device memory."""
