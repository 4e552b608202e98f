"""``prefault doctor``: show what this machine can do, its limits, and plain advice."""

from __future__ import annotations

import click

from prefault.cli.json_output import json_option, print_json
from prefault.doctor import examine, to_json


@click.command()
@json_option("prefault-doctor")
def doctor(as_json: bool) -> None:
    """Show what this machine can do for prefault, what limits it, and what could be better.

    The command changes nothing. Its exit status is 0, also where there is advice.

    \b
    Examples:
      prefault doctor
      prefault doctor --json | jq '.advice[].remedy'
    """
    report = examine()
    if as_json:
        document = to_json(report)
        print_json(document.pop("kind"), document.pop("schema"), document)
        return
    from prefault.doctor.report import show

    show(report)
