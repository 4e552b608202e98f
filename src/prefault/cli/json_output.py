"""The output of ``--json``: one object on stdout, described by a JSON Schema in ``docs/schemas``."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(kind: str) -> Callable[[Command], Command]:
    """Return the option ``--json`` of a command, which the command gets as ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help=f"Print one JSON object (docs/schemas/{kind}.json) instead of text."
    )


def print_json(kind: str, schema: int, content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout: ``schema``, ``kind``, and the members of ``content``.

    Members stand on a line each, and so do the elements of a member that is a list: a table of 100 000 files can be read by
    line. A member may be an iterator, which is written as a list while it runs, in constant memory.

    A value is None, a bool, a number, a string, a path, an Enum, a list, a tuple, a mapping, or a named tuple (written as an
    object). A string that is not UTF-8 is written as :func:`name_to_json` says.
    """
    stdout = sys.stdout
    if stdout is None:
        return
    lead = "{\n"
    for name, value in {"schema": schema, "kind": kind, **content}.items():
        stdout.write(f"{lead} {json.dumps(name)}: ")
        lead = ",\n"
        if isinstance(value, Iterator) or (isinstance(value, list | tuple) and not hasattr(value, "_asdict")):
            between = "[\n  "
            for element in value:
                stdout.write(f"{between}{_text(element)}")
                between = ",\n  "
            stdout.write("\n ]" if between.startswith(",") else "[]")
        else:
            stdout.write(_text(value))
    stdout.write("\n}\n")


def name_to_json(name: str) -> str | dict[str, str]:
    r"""Convert the name of a file, process or tensor to a JSON value: itself, if it is Unicode text.

    Linux has names of any bytes but NUL, and JSON has only Unicode. The name ``b"caf\xe9"`` is an object: ``base64`` has its
    bytes, and ``text`` has U+FFFD in place of those that are no UTF-8, for people. Readers that expect a string fail, rather
    than take another file for it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        pass
    else:
        return name
    try:
        encoded = name.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair: no name of a file, but a JSON header may have it
        encoded = name.encode(errors="surrogatepass")
    return {"base64": base64.b64encode(encoded).decode(), "text": encoded.decode(errors="replace")}


def _text(value: object) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """Convert a value to what the json module takes."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return value if value.isascii() else name_to_json(value)
    if isinstance(value, bytes | os.PathLike):
        return name_to_json(os.fsdecode(value))
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no form in JSON")
