"""Options of classes that are chosen by name: what another choice keeps, and who takes an option that one does not.

Takes the words of a command line and what jsonargparse reads, gives the parser and what is said where something is
refused. Knows no class by name but those that lay elsewhere in earlier versions, and no option but those that name what
to train.
"""

import inspect
import re
import sys
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn, get_args

from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

QUICKSTART_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NAMING_OPTIONS = (
    "--config",
    "--confi",
    "--conf",
    "--con",
    "--co",
    "-c",
    "--model.policy",
    "--data.path",
)  # argparse takes them


def add_quickstart_config(arguments: Sequence[str]) -> list[str]:
    """The words; of a `fit` that names neither configuration nor model nor data, with those of the quickstart."""
    named = any(word.split("=")[0].replace(".init_args.", ".") in NAMING_OPTIONS for word in arguments)
    quickstart = ["--config", str(QUICKSTART_CONFIG)] if arguments[:1] == ["fit"] and not named else []
    return [*arguments[:1], *quickstart, *arguments[1:]]


def set_argv(arguments: Sequence[str]) -> None:
    """Make these the command line, which is parsed here and run again by every process that Lightning starts."""
    sys.argv[1:] = arguments


def error_message(error: BaseException) -> str:
    """What is wrong, without jsonargparse's list of all that the option is not."""
    wrapped = error.__cause__ if "Union subtypes" in str(error) else None
    return error_message(wrapped) if wrapped else f"{type(error).__name__}: {error}"


REFUSED_OPTION_PATTERN = re.compile(r"class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)(\w+)")
_discard: Callable[[Any, Any, Any], None] = _typehints.discard_init_args_on_class_path_change


UNKNOWN_CLASS_PATTERN = re.compile(r"Expected a dot import path string: (\w+)$", re.M)
EXPECTED_CLASS_PATTERN = re.compile(r"class_path '([\w.]+)':\s+Parser key \"(\w+)\"|Subtypes: \[<class '([\w.]+)'>")


# Classes that a configuration may name, and where they lay when earlier versions wrote it.
MOVED = {
    f"dpo.{old}.{name}": f"dpo.{new}.{name}"
    for old, new, names in (
        ("adapters", "models.lora", "AsLoaded LoRA QLoRA"),
        ("reference", "models.reference", "AdapterOff Copy Model Moving Nothing"),
        ("precision", "models.cpu", "bfloat16_where_fast"),
        ("data", "data.preferences", "HHRLHF PreferencePairs"),
        ("prompts", "data.prompts", "Prompts"),
        ("module", "training.dpo", "DPO"),
        ("sft", "training.sft", "SFT"),
        ("cached", "training.precomputed", "Cached"),
        ("schedules", "training.schedules", "Warmup"),
    )
    for name in names.split()
}
MOVED_PATH = re.compile(rf"\b(?:{'|'.join(map(re.escape, MOVED))})\b")


class HintingParser(LightningArgumentParser):
    """Lightning's parser; where an option is not accepted, it says by whom it is, and last what may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message."""
        hints = [_hint(*refused.groups()) for refused in REFUSED_OPTION_PATTERN.finditer(message)]
        new = [hint for hint in hints if hint not in message]  # parsers within parsers have said theirs
        last = _meant(message) if self.exit_on_error else []
        super().error("\n".join([message, *new, *last]), ex)

    def _load_config_parser_mode(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Read a configuration, also one of an earlier version."""
        now = MOVED_PATH.sub(lambda found: MOVED[found[0]], content)
        return super()._load_config_parser_mode(now, *args, **kwargs)

    def print_usage(self, file: Any = None) -> None:
        """Nothing: the fifty lines of all options would stand before every message, which names `--help`."""


def _hint(path: str, option: str) -> str:
    takers = sorted(leaf.__name__ for leaf in sibling_classes(path) if option in inspect.signature(leaf).parameters)
    return f"'{option}' is taken by {', '.join(takers)}." if takers else ""


def _meant(message: str) -> list[str]:
    """One line on the option or class that there is none of, with those that are spelled much like it."""
    for path, option in REFUSED_OPTION_PATTERN.findall(message)[-1:]:
        return [_line(f"{path.rpartition('.')[2]} has no option", option, set(_parameters(path)))]
    for name in UNKNOWN_CLASS_PATTERN.findall(message)[-1:]:
        roots = [_types(*found) for found in EXPECTED_CLASS_PATTERN.findall(message)]
        return [_line("there is no class", name, {cls.__name__ for root in roots[-1:] for cls in root})]
    return []


def _line(what: str, name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), cutoff=0.5)
    return f"error: {what} {name!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _types(path: str, option: str, root: str) -> list[type[Any]]:
    """All classes below a class, or below those that an option of a class takes."""
    wanted = _class(root) if root else _parameters(path)[option]
    return [cls for kind in get_args(wanted) or [wanted] for cls in _below(kind)]


def _parameters(path: str) -> dict[str, Any]:
    """What a class and those that it passes options on to take: names and types."""
    signatures = [inspect.signature(cls) for cls in reversed(_class(path).__mro__[:-1])]
    return {name: given.annotation for signature in signatures for name, given in signature.parameters.items()}


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return vars(import_module(module))[name]


def _below(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(deeper for below in type.__subclasses__(cls) for deeper in _below(below))]


def sibling_classes(path: str) -> Iterator[type[Any]]:
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

    What jsonargparse should do itself (its issue 460): it hands the defaults on, as if somebody had chosen them. And it
    drops without a word what was given and the new class does not take. Said aloud here, and refused where the class is
    nothing but its options (a loss, a reference, an adapter).

    Raises:
        SystemExit: Such an option was given, with a message. No ValueError: where a type is a choice of several,
            jsonargparse would try the next one.
    """
    if not isinstance(before, Namespace) or "init_args" not in before or before.class_path == value["class_path"]:
        _discard(parser, before, value)
        return
    old, hint = locate(before.class_path), _typehints.ActionTypeHint
    defaults = hint.get_class_parser(old, {}).get_defaults()  # type: ignore[no-untyped-call]
    for name, given in list(vars(before.init_args).items()):
        if _is(given, defaults.get(name)):
            before.init_args.pop(name)
    offered = {name for name, given in vars(before.init_args).items() if given is not None}
    _discard(parser, before, value)
    for name in sorted(offered - vars(before.init_args).keys()):
        found, now = (path.rpartition(".")[2] for path in (before.class_path, value["class_path"]))
        message = f"'{name}' was given for {found}, and {now} in its place does not take it"
        if is_dataclass(old):
            raise SystemExit(f"{message}. {_hint(before.class_path, name)} Take it out of the configuration.")
        _say(f"Left out: {message}.")


def _is(given: Any, value: Any) -> bool:
    """Whether two values are the same, or the same class with options of which one says no more than the other."""
    if isinstance(given, list) and isinstance(value, tuple):
        return tuple(given) == value
    if not isinstance(given, Namespace) or not isinstance(value, Namespace):
        return bool(given == value)
    options, others = (vars(spec.init_args) if "init_args" in spec else {} for spec in (given, value))
    same = all(_is(options[name], others[name]) for name in options.keys() & others.keys())
    return same and given.get("class_path") == value.get("class_path")


@cache
def _say(text: str) -> None:
    """Once, however often a command line is parsed."""
    rank_zero_info(text)


_typehints.discard_init_args_on_class_path_change = _let_go
