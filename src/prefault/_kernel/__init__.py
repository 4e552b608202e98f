"""One thin function per system call, under the kernel's name and without policy. Failures are ``OSError``.

Only this package declares functions of the kernel, and only this package knows layouts and numbers.
``tests/kernel/test_headers.py`` compares every constant and structure of it with the kernel's own headers.
"""
