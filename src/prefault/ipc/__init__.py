"""Unix sockets between processes of one user: paths, connections, bytes and descriptors, messages."""
