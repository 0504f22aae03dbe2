"""Options of classes that are chosen by name: what another choice keeps, and who takes an option that one does not.

Takes what jsonargparse reads, gives the parser of the command line. Knows no class by name.
"""

import inspect
import re
from abc import ABC
from collections.abc import Callable, Iterator
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser

REFUSED = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
_discard: Callable[[Any, Any, Any], None] = _typehints.discard_init_args_on_class_path_change


class Parser(LightningArgumentParser):
    """Lightning's parser; where an option is not accepted, it says by whom it is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message."""
        hints = [_hint(*refused.groups()) for refused in REFUSED.finditer(message)]
        new = [hint for hint in hints if hint not in message]  # parsers within parsers have said theirs
        super().error("\n".join([message, *new]), ex)


def _hint(path: str, option: str) -> str:
    takers = sorted(leaf.__name__ for leaf in relatives(path) if option in inspect.signature(leaf).parameters)
    return f"'{option}' is taken by {', '.join(takers)}." if takers else ""


def relatives(path: str) -> Iterator[type[Any]]:
    """All final classes below the abstract class of this project that a class is of."""
    lineage = [c for c in getattr(locate(path), "__mro__", ()) if c.__module__.split(".")[0] == path.split(".")[0]]
    roots = [c for c in lineage if ABC in c.__bases__]
    return _leaves(roots[-1]) if roots else iter(())


def _leaves(cls: type[Any]) -> Iterator[type[Any]]:
    if inspect.isabstract(cls):
        for below in cls.__subclasses__():
            yield from _leaves(below)
    else:
        yield cls


def _let_go(parser: Any, before: Any, value: Any) -> None:
    """A class that takes another's place keeps what was given, not what was that one's default.

    What jsonargparse should do itself (its issue 460): it hands the defaults on, as if somebody had chosen them.
    """
    if isinstance(before, Namespace) and "init_args" in before and before.class_path != value["class_path"]:
        parameters = inspect.signature(locate(before.class_path)).parameters  # type: ignore[arg-type]  # a class
        for name, given in list(vars(before.init_args).items()):
            if name in parameters and parameters[name].default == given:
                before.init_args.pop(name)
    _discard(parser, before, value)


_typehints.discard_init_args_on_class_path_change = _let_go
