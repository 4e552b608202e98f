"""Types of options that several commands take: sizes, rates, numbers, processes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from prefault.engine.rate import RateLimit
from prefault.sizes import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


class SizeType(click.ParamType):  # type: ignore[type-arg]  # a class without types before click 8.3
    """A size such as ``4096``, ``64k`` or ``"2 GiB"``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            return parse_size(value)
        except (ValueError, TypeError) as error:
            self.fail(str(error), param, ctx)


class RateType(click.ParamType):  # type: ignore[type-arg]
    """A rate such as ``500M`` or ``"2 GiB/s"``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return bytes a second."""
        try:
            return RateLimit(value).bytes_per_second
        except (ValueError, TypeError) as error:
            self.fail(str(error), param, ctx)


class PidType(click.ParamType):  # type: ignore[type-arg]
    """The number of a process."""

    name = "pid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        if isinstance(value, int):
            return value
        if not re.fullmatch("[0-9]{1,20}", value) or not int(value):
            self.fail(f"{value!r} is no number of a process: give one such as 1234 (pgrep NAME prints them)", param, ctx)
        return int(value)


class CountType(click.IntRange):
    """A number of things, within bounds."""

    name = "whole number"


class SecondsType(click.FloatRange):
    """A number of seconds, within bounds."""

    name = "number of seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; nan, which every comparison with a bound lets pass, is refused."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return seconds


def pid_option(what: str) -> Callable[[Command], Command]:
    """Return the option ``--pid`` of a command, whose help is ``what``. The command gets an int or None as ``pid``."""
    return click.option("--pid", type=PidType(), metavar="PID", help=what)


def rate_option(command: Command) -> Command:
    """Add ``--rate``, which the command gets as ``rate``: bytes a second, or None."""
    return click.option(
        "--rate", type=RateType(), metavar="SIZE", help="At most so many bytes a second, such as 500M; at least 64K."
    )(command)
