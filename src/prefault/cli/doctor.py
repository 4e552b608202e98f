"""``prefault doctor``: show what this machine can do, its limits, and plain advice."""

from __future__ import annotations

import json

import click

from prefault.doctor import examine, to_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/doctor-json.md) instead of text.")
def doctor(as_json: bool) -> None:
    """Show what this machine can do for prefault, what limits it, and what could be better.

    The command changes nothing. Its exit status is 0, also where there is advice.
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(to_json(report), indent=2))
        return
    from prefault.doctor.report import show

    show(report)
