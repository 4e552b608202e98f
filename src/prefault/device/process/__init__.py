"""Start the processes of a device: a warden and its server, for one client or for many at a path."""
