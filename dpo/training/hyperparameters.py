"""Constructor arguments as plain values, so that a checkpoint can rebuild its module without unpickling code.

A class instance becomes ``{"class_path": ..., "init_args": {...}}``, as in a YAML configuration.
"""

import sys
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from inspect import isclass, signature
from typing import Any

import torch

TRUSTED_PACKAGES = ("dpo", "torch")
"""Imported when a checkpoint names them; classes from elsewhere must have been imported by the user."""


def class_path(cls: type[Any]) -> str:
    """Return the shortest path that a class can be imported from, such as ``dpo.losses.IPO``."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def to_plain(value: Any) -> Any:
    """Describe a value by plain values; what cannot be described, by its ``repr`` under ``"unsaved"``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): to_plain(each) for name, each in value.items()}
    if is_dataclass(value) and not isclass(value):
        options = {each.name: to_plain(getattr(value, each.name)) for each in fields(value) if each.init}
        return {"class_path": class_path(type(value)), "init_args": options}
    if isinstance(value, partial) and isclass(value.func) and not value.args:
        return {"class_path": class_path(value.func), "init_args": to_plain(value.keywords)}
    if isclass(value):
        return {"class_path": class_path(value), "init_args": {}}
    return {"unsaved": repr(value)}


def is_unsaved(described: Any) -> bool:
    """Return whether `to_plain` could not describe a value."""
    return isinstance(described, dict) and "unsaved" in described


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer by its class and the options that all its parameters share."""
    known = signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    return {"class_path": class_path(type(optimizer)), "init_args": to_plain(options)}


def from_plain(value: Any, *, as_factory: bool = False) -> Any:
    """Rebuild what `to_plain` has described.

    Args:
        value: The description.
        as_factory: Give a `functools.partial` of the outermost class instead of an instance.

    Raises:
        ValueError: The value was not saved; a class was not imported, or there is none of that name.
    """
    if isinstance(value, list):
        return tuple(from_plain(each) for each in value)
    if not isinstance(value, dict):
        return value
    if is_unsaved(value):
        raise ValueError(f"the checkpoint does not hold {value['unsaved']}: pass the object by keyword.")
    if set(value) != {"class_path", "init_args"}:
        return {name: from_plain(each) for name, each in value.items()}
    cls, options = _find_class(value["class_path"]), from_plain(value["init_args"])
    return partial(cls, **options) if as_factory else cls(**options)  # type: ignore[misc]  # a class of any kind


def _find_class(path: str) -> type[Any]:
    name, _, attribute = path.rpartition(".")
    module = import_module(name) if name.split(".")[0] in TRUSTED_PACKAGES else sys.modules.get(name)
    found = getattr(module, attribute, None)
    if not isclass(found):
        raise ValueError(
            f"the checkpoint names the class {path!r}: expected a class that is imported already, since code named by "
            f"a checkpoint is never imported. Import {name!r} first, or pass the object by keyword."
        )
    return found
