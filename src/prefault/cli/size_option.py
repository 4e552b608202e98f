"""Type of options that take a size."""

from __future__ import annotations

from typing import Any

import click

from prefault.sizes import parse_size


class SizeType(click.ParamType):  # type: ignore[type-arg]  # a class without types before click 8.3
    """A size such as ``4096``, ``64k`` or ``"2 GiB"``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            return parse_size(value)
        except (ValueError, TypeError) as error:
            self.fail(str(error), param, ctx)
