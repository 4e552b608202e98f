"""Recipes: check that one can be sent to another process, create its device there, and check that device."""

from __future__ import annotations

import errno
import importlib
import re
from typing import Any

from prefault.device.driver import Device, FaultAround, Recipe
from prefault.errors import DeviceError
from prefault.sizes import MIB, PAGE_SIZE

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_PAGE_SIZES = (PAGE_SIZE, 2 * MIB)
_MAX_LENGTH = 1 << 62
_MAX_DEPTH = 100


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe can be sent to another process and that its factory is importable by name.

    Raises:
        TypeError: not a recipe, or an argument of a type that :class:`Recipe` does not list.
        ValueError: the factory is not ``"package.module:name"``.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe() returns a prefault.device.Recipe or None, not {type(recipe).__name__}")
    check_factory(recipe.factory)
    check_arguments(recipe.arguments)


def check_factory(factory: str) -> None:
    """Check that a factory is ``"package.module:name"`` and not of ``__main__``; raise ValueError if not."""
    if not isinstance(factory, str) or not _FACTORY.fullmatch(factory):
        raise ValueError(f"the factory of a device is named 'package.module:name', not {factory!r}")
    if factory.startswith("__main__:"):
        raise ValueError(
            f"{factory!r} cannot be imported by another process: move the class into a module, or return None from recipe(),"
            " so that the server is a fork of this process"
        )


def check_arguments(arguments: object) -> None:
    """Check that these are arguments of a recipe; raise TypeError if not."""
    if not isinstance(arguments, dict):
        raise TypeError(f"the arguments of a recipe are a dict, not {type(arguments).__name__}")
    _check_plain(arguments, "arguments", 0)


def _check_plain(value: Any, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise TypeError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    # Exact types: a subclass would arrive as its base class.
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"a recipe's dicts have str as keys, and {where} has {key!r}")
            _check_plain(item, f"{where}[{key!r}]", depth + 1)
    elif kind is list:
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]", depth + 1)
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise TypeError(f"{where} of a recipe is an integer of more than 64 bits")
    elif value is not None and kind not in (bool, float, str, bytes):
        raise TypeError(
            f"{where} of a recipe is {kind.__name__}: what travels to another process is None, bool, int, float, str, bytes,"
            " and lists and dicts of these"
        )


def make_device(recipe: Recipe) -> Device:
    """Import the factory of a recipe, call it, and return the device.

    Raises:
        DeviceError: the module is missing, the factory raised, or it did not return a valid device.
    """
    module_name, _, name = recipe.factory.partition(":")
    try:
        check_factory(recipe.factory)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DeviceError(
            errno.ENOENT, f"the device {recipe.factory} cannot be made: there is no module {error.name} on sys.path"
        ) from error
    except (Exception, SystemExit) as error:
        raise DeviceError(
            errno.EINVAL, f"the device {recipe.factory} cannot be made: to import {module_name} failed: {_describe(error)}"
        ) from error
    try:
        factory = getattr(module, name)
    except AttributeError:
        raise DeviceError(errno.ENOENT, f"the device {recipe.factory} cannot be made: {module_name} has no {name}") from None
    try:
        device = factory(**recipe.arguments)
    except (Exception, SystemExit) as error:
        raise DeviceError(errno.EINVAL, f"the device {recipe.factory} cannot be made: {_describe(error)}") from error
    try:
        check_device_attributes(device)
    except (TypeError, ValueError) as error:
        raise DeviceError(errno.EINVAL, f"what {recipe.factory} makes is no device: {error}") from error
    assert isinstance(device, Device)
    return device


def _describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}"[:2000] if text else type(error).__name__


def check_device_attributes(device: object) -> None:
    """Check the attributes of a device before it is served.

    Raises:
        TypeError, ValueError: an attribute is invalid; the message names it and its allowed values.
    """
    if not isinstance(device, Device):
        raise TypeError(f"{type(device).__name__} is not a prefault.device.Device")
    name = type(device).__name__
    length = getattr(device, "length", None)
    if type(length) is not int:
        raise TypeError(f"{name}.length is a number of bytes, set by __init__, not {length!r}")
    if not 0 < length <= _MAX_LENGTH:
        raise ValueError(f"{name}.length is at least 1 byte and at most {_MAX_LENGTH}, not {length}")
    if device.page_size not in _PAGE_SIZES:
        raise ValueError(f"{name}.page_size is {' or '.join(map(str, _PAGE_SIZES))}, not {device.page_size!r}")
    if type(device.workers) is not int or not 0 <= device.workers <= 256:
        raise ValueError(f"{name}.workers is 0 to 256 threads, not {device.workers!r}")
    most = device.object_workers
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"{name}.object_workers is None or at least 1, not {most!r}")
    if type(device.batch) is not int or device.batch < 1:
        raise ValueError(f"{name}.batch is a number of bytes, not {device.batch!r}")
    if not isinstance(device.timeout_s, int | float) or not 0 < device.timeout_s < 1e6:
        raise ValueError(f"{name}.timeout_s is a number of seconds above 0, not {device.timeout_s!r}")
    if device.capacity is not None and (type(device.capacity) is not int or device.capacity < device.page_size):
        raise ValueError(
            f"{name}.capacity is None or at least one page of {device.page_size} bytes, not {device.capacity!r}"
        )
    around = device.fault_around
    if around is not None and (not isinstance(around, FaultAround) or not 0 < around.first <= around.most):
        raise ValueError(f"{name}.fault_around is None or a FaultAround with 0 < first <= most, not {around!r}")
