"""Checks of arguments in the client classes of drivers: a typo is an error before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable

from prefault.device.object_table import encode_object_name


def check_client(user: str, client: object) -> None:
    """Raise TypeError if an argument is not a connection to a device; ``user``: the class or function that takes it."""
    from prefault.device import DeviceClient  # a server imports the client classes too, and need not load this

    if not isinstance(client, DeviceClient):
        raise TypeError(
            f"{user} takes a DeviceClient, which prefault.device.open() and prefault.device.connect() return, not {client!r}"
        )


def check_request(request: object) -> None:
    """Raise TypeError or ValueError if a request names an object by what cannot be the name of one."""
    if hasattr(request, "name"):
        encode_object_name(request.name)


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError, with all choices, if a value is none of them."""
    *others, last = choices
    if value not in (*others, last):
        raise ValueError(f"{what} is {', '.join(map(_quoted, others))} or {_quoted(last)}, not {value!r}")


def _quoted(choice: str) -> str:
    return repr(str(choice))
