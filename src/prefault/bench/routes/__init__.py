"""The benchmark of device memory: routes to populated pages, on a device of one byte value and on devices that ship."""
