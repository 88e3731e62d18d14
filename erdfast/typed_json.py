"""JSON that people may have edited, and dataclasses: whatever does not fit is a ValueError that names it."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from typing import Any, TypeVar

Group = TypeVar("Group")


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    return values


def inner_object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The object under a name.

    Raises:
        ValueError: there is none.
    """
    if name not in values:
        raise ValueError(f"{name!r} is missing")
    if not isinstance(values[name], dict):
        raise ValueError(f"{name} is {reprlib.repr(values[name])}; it must be an object of options")
    return values[name]


def fill(group: type[Group], values: dict[str, Any], name: str) -> Group:
    """A dataclass from values by field; those that are missing keep their defaults.

    Args:
        group: the dataclass.
        values: lists stand for tuples: JSON knows lists alone.
        name: what the dataclass is called in errors.

    Raises:
        ValueError: there is no such field.
    """
    known = [field.name for field in dataclasses.fields(typing.cast(Any, group))]
    if unknown := sorted(values.keys() - {*known}):
        raise ValueError(f"{name} has no option {unknown[0]!r}; choose from {', '.join(known)}")
    return group(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_types(config: Any) -> None:
    """Raise ValueError unless every field, in groups too, has the type that it is declared with."""
    for name, declared in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(declared):
            check_types(value)
        elif not _is_of_type(value, declared):
            raise ValueError(
                f"{name} is {reprlib.repr(value)}; it must be of type {getattr(declared, '__name__', declared)}"
            )


def _is_of_type(value: Any, declared: Any) -> bool:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_type(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        lengths_fit = isinstance(value, tuple) and (arguments[-1] is ... or len(value) == len(arguments))
        return lengths_fit and all(_is_of_type(item, arguments[0]) for item in value)
    if declared in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if declared is float else declared)


def require(name: str, value: Any, condition: bool, rule: str) -> None:
    """Raise ValueError, naming the option, its value and the rule, unless the condition holds.

    A float that is not finite never passes: comparisons with NaN are false in either direction.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number, {rule}")
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {rule}")
