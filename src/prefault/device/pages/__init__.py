"""The pages of a device in its server: their states, the entries of clients, and what takes pages away from them."""
