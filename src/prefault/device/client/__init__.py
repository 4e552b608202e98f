"""The side of a device in the process that maps it: connection, areas and the page provider."""
