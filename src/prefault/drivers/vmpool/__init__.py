"""Memory of virtual machines from a dedicated pool of blocks."""
