"""How the processes of a device are started."""
