"""One thin function per system call, under the kernel's name and without policy. Failures are ``OSError``.

The only place that imports ctypes' function machinery for the kernel, and the only one that knows layouts and numbers.
Every constant and structure here is proven against the kernel's own headers by ``tests/kernel/test_headers.py``.
"""
