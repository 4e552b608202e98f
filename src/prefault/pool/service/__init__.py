"""A pool shared between processes: its server, its clients and their protocol."""
