"""The verbs on paths: which pages of files are in the page cache; bring them in, evict them, lock them."""
