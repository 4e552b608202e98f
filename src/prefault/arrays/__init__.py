"""Arrays on memory that is populated from the start, and loops that must not fault."""
