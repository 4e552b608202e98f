"""Unix sockets between processes of one user: their paths, and what travels on them."""
