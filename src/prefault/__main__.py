"""``python -m prefault``: the command."""

import sys

from prefault.cli import main

if __name__ == "__main__":
    sys.exit(main())
