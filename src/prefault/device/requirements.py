"""msgspec, which messages are made of; or a sentence that says how to get it."""

try:
    import msgspec as msgspec
except ImportError:
    raise ImportError("device memory needs msgspec, which is not installed: pip install msgspec", name="msgspec") from None
