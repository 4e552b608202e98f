"""Run a command in a terminal of its own and save what it prints as an SVG picture.

Usage: terminal_picture.py OUTPUT.svg COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_COLUMNS = 100


def run(command: list[str]) -> str:
    """Run ``command`` in a terminal, and return its output."""
    os.environ |= {"COLUMNS": str(_COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    output = io.BytesIO()

    def read(fd: int) -> bytes:
        data = os.read(fd, 65536)
        output.write(data)
        return data

    status = pty.spawn(command, read)
    if status:
        sys.exit(f"{command[0]} ended with status {os.waitstatus_to_exitcode(status)}")
    return output.getvalue().decode().replace("\r\n", "\n")


def main(target: Path, command: list[str]) -> None:
    # stderr has the progress bar, which does not stay on the screen: it is dropped.
    text = run(["sh", "-c", 'exec "$@" 2>/dev/null', "sh", *command])
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"$ {' '.join([Path(command[0]).name, *command[1:]])}\n", highlight=False)
    console.print(Text.from_ansi(text.rstrip()))
    picture = console.export_svg(title="prefault")
    # rich links a web font. The picture must not depend on its host; the viewer's own monospace font will do.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    target.write_text(re.sub(r"^\s*<!-- .*? -->\n", "", picture, flags=re.MULTILINE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
