"""The process that keeps what a server needs to be replaced, and answers when there is no server."""
