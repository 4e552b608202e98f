"""The JSON Schemas in docs/schemas, applied to what commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

FOLDER = Path(__file__).parent.parent.parent / "docs" / "schemas"


def check_document(document: Any, kind: str) -> None:
    """Check one object against the schema of its kind; a member that the schema does not describe is a failure.

    The published schemas allow further members, since later versions may add some.
    """
    assert isinstance(document, dict)
    assert document["kind"] == kind
    jsonschema.Draft202012Validator(_closed(schema_of(kind))).validate(document)


def check_output(output: str, kind: str) -> Any:
    """Check the output of a command, which is one object and nothing else, and return it."""
    document = json.loads(output, parse_constant=_refuse)
    check_document(document, kind)
    return document


def schema_of(kind: str) -> Any:
    return json.loads((FOLDER / f"{kind}.json").read_text())


def _closed(schema: Any) -> Any:
    """Return the schema with all its objects closed to members that it does not describe."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    if "properties" in schema and "object" in schema.get("type", ()):
        closed.setdefault("additionalProperties", False)
    return closed


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
