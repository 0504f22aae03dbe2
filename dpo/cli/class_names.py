"""Classes that a command line may name, their options, and names that are spelled much like another."""

import inspect
from abc import ABC
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pydoc import locate
from typing import Any


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return a question that offers the known names that are spelled much like a name, or nothing."""
    by_lower = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), by_lower, cutoff=0.5)
    if len(name) > 3:
        near += [lower for lower in by_lower if name.lower() in lower and lower not in near][:3]
    return f"Did you mean {' or '.join(by_lower[lower] for lower in near)}?" if near else ""


def option_takers(class_path: str, option: str) -> str:
    """Return a sentence that names the sibling classes that take an option, or nothing."""
    classes = [cls for cls in sibling_classes(class_path) if option in inspect.signature(cls).parameters]
    return f"'{option}' is taken by {', '.join(sorted(cls.__name__ for cls in classes))}." if classes else ""


def sibling_classes(class_path: str) -> Iterator[type[Any]]:
    """Return the concrete classes below the abstract class of the same package that a class derives from."""
    package = class_path.split(".")[0]
    lineage = [c for c in getattr(locate(class_path), "__mro__", ()) if c.__module__.split(".")[0] == package]
    roots = [c for c in lineage if ABC in c.__bases__]
    return _first_concrete(roots[-1]) if roots else iter(())


def _first_concrete(cls: type[Any]) -> Iterator[type[Any]]:
    if not inspect.isabstract(cls):
        yield cls
        return
    for below in cls.__subclasses__():
        yield from _first_concrete(below)


def offered_classes(cls: type[Any]) -> Iterator[type[Any]]:
    """Yield the classes below a class that a user may name: of this package those with a public name, of others all.

    Of subclasses of torch and Lightning that some third package brings along, none is meant.
    """
    package = import_module("dpo")
    for below in type.__subclasses__(cls):
        root = below.__module__.partition(".")[0]
        names = (getattr(package, below.__name__, None), getattr(package.losses, below.__name__, None))
        foreign = cls.__module__.startswith(("torch.", "lightning.")) and root not in ("torch", "lightning")
        is_offered = below in names if root == "dpo" else not foreign
        if is_offered and not inspect.isabstract(below) and not below.__name__.startswith("_"):
            yield below
        yield from offered_classes(below)


def class_options(class_path: str) -> dict[str, inspect.Parameter]:
    """Return the options of a class by name."""
    return dict(inspect.signature(import_class(class_path)).parameters)


def import_class(class_path: str) -> Any:
    """Import a class by its dotted path."""
    module, _, name = class_path.rpartition(".")  # not only `locate`: torch.optim hides its modules
    return getattr(import_module(module), name)
