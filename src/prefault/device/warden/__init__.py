"""The process that keeps a device's clients alive when its server dies: it starts another, or answers instead."""
