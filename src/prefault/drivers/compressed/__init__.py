"""Memory whose cold pages are compressed: the worked example of the guide to device memory."""
