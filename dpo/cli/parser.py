"""Parsing of the training command line: configurations by name, classes by name, and errors that say what was meant.

jsonargparse does the parsing. What is added here: configurations that come with the package, class paths of earlier
versions, near misses in error messages, and that no option is dropped silently when one class takes another's place.
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

PACKAGE = Path(__file__).parents[1]
# Inside the package when it was installed from a wheel, beside it in a checkout.
CONFIG_FOLDER = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
WHAT_TO_TRAIN = ("-c", "--model.policy", "--data.path")

# Where classes of configurations were in earlier versions; they are all named from `dpo` now.
_OLD_CLASS_PATH = re.compile(r"\bdpo\.(?:adapters|cached|data|module|prompts|reference|schedules|sft)\.([A-Z]\w*)")
_OLD_PRECISION = "dpo.precision.bfloat16_where_fast"

# What jsonargparse says of an option that a class does not take, of a class that does not exist, and where.
_REFUSED_OPTION = re.compile(r"class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)(\w+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$", re.M)
_EXPECTED_CLASS = re.compile(r"class_path '([\w.]+)':\s+Parser key \"(\w+)\"|Subtypes: \[<class '([\w.]+)'>")


def complete_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the quickstart where nothing is named, and with packaged configurations found.

    A ``fit`` that names neither configuration nor policy nor data gets the quickstart's configuration.
    """
    words = [_translate(word) for word in arguments]
    names_nothing = not any(map(_names_what_to_train, words))
    if words[:1] == ["fit"] and names_nothing:
        words[1:1] = ["--config", str(CONFIG_FOLDER / "quickstart.yaml")]
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if _is_config(option) and value:
            words[place] = f"{option}={find_config(value)}"
        elif place and _is_config(words[place - 1]):
            words[place] = find_config(word)
    return words


def _is_config(option: str) -> bool:
    return option == "-c" or (len(option) > len("--c") and "--config".startswith(option))  # argparse takes prefixes


def _names_what_to_train(word: str) -> bool:
    option = word.partition("=")[0].replace(".init_args.", ".")
    return option in WHAT_TO_TRAIN or _is_config(option)


def find_config(path: str) -> str:
    """Return the path of a configuration; ``configs/...`` that is not here is looked for in the package."""
    packaged = CONFIG_FOLDER / path.removeprefix("configs/")
    return str(packaged) if not Path(path).exists() and packaged.is_file() else path


def _translate(text: str) -> str:
    """Replace class paths of earlier versions."""
    return _OLD_CLASS_PATH.sub(r"dpo.\1", text).replace(_OLD_PRECISION, "dpo.models.cpu.bfloat16_where_fast")


def set_argv(arguments: Sequence[str]) -> None:
    """Set the command line that is parsed here and run again by every process that Lightning starts."""
    sys.argv[1:] = arguments


def error_message(error: BaseException) -> str:
    """Return what is wrong, without jsonargparse's list of all types that a value could have had."""
    wrapped = error.__cause__ if "Union subtypes" in str(error) else None
    return error_message(wrapped) if wrapped else f"{type(error).__name__}: {error}"


class HintingParser(LightningArgumentParser):
    """Lightning's parser with errors that name who takes a refused option, and close matches of unknown names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message whose last line says what may have been meant."""
        hints = [_option_takers(*refused.groups()) for refused in _REFUSED_OPTION.finditer(message)]
        new_hints = [hint for hint in hints if hint not in message]  # nested parsers have added theirs
        suggestion = _suggestion(message) if self.exit_on_error else []
        super().error("\n".join([message, *new_hints, *suggestion]), ex)

    def _load_config_parser_mode(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        return super()._load_config_parser_mode(_translate(content), *args, **kwargs)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the usage of all options would stand before every message, which names ``--help``."""


def _option_takers(class_path: str, option: str) -> str:
    classes = [cls for cls in sibling_classes(class_path) if option in inspect.signature(cls).parameters]
    return f"'{option}' is taken by {', '.join(sorted(cls.__name__ for cls in classes))}." if classes else ""


def _suggestion(message: str) -> list[str]:
    """Return one line on the last unknown option or class, with names that are spelled much like it."""
    for class_path, option in _REFUSED_OPTION.findall(message)[-1:]:
        name = class_path.rpartition(".")[2]
        return [_close_matches(f"{name} has no option", option, set(_parameters(class_path)))]
    for unknown in _UNKNOWN_CLASS.findall(message)[-1:]:
        expected = [_accepted_classes(*match) for match in _EXPECTED_CLASS.findall(message)]
        names = {cls.__name__ for classes in expected[-1:] for cls in classes}
        return [_close_matches("there is no class", unknown, names)]
    return []


def _close_matches(problem: str, name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), cutoff=0.5)
    return f"error: {problem} {name!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _accepted_classes(class_path: str, option: str, base: str) -> list[type[Any]]:
    """Return all classes below a base class, or below the types of an option of a class."""
    accepted = _import_class(base) if base else _parameters(class_path)[option].annotation
    return [cls for each in get_args(accepted) or [accepted] for cls in _with_subclasses(each)]


def _parameters(class_path: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(_import_class(class_path)).parameters)


def _import_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")  # not `locate`: torch.optim hides its modules
    return getattr(import_module(module), name)


def _with_subclasses(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(deeper for below in type.__subclasses__(cls) for deeper in _with_subclasses(below))]


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


def _discard_old_options(parser: Any, before: Any, value: Any) -> None:
    """Keep what was given when a class takes another's place, but not the other's defaults.

    jsonargparse (its issue 460) hands the defaults on as if somebody had chosen them, and drops options that the new
    class does not take without a word. Here the latter is logged, and refused where the class is nothing but its
    options (a loss, a reference, an adapter).

    Raises:
        SystemExit: Such an option was given. No ValueError: where a type is a union, jsonargparse would try the next.
    """
    if not isinstance(before, Namespace) or "init_args" not in before or before.class_path == value["class_path"]:
        _discard(parser, before, value)
        return
    old_class = locate(before.class_path)
    defaults = _typehints.ActionTypeHint.get_class_parser(old_class, {}).get_defaults()  # type: ignore[no-untyped-call]
    for name, given in list(vars(before.init_args).items()):
        if _is_same(given, defaults.get(name)):
            before.init_args.pop(name)
    offered = {name for name, given in vars(before.init_args).items() if given is not None}
    _discard(parser, before, value)
    old, new = (path.rpartition(".")[2] for path in (before.class_path, value["class_path"]))
    for name in sorted(offered - vars(before.init_args).keys()):
        message = f"'{name}' was given for {old}, and {new} in its place does not take it"
        if is_dataclass(old_class):
            takers = _option_takers(before.class_path, name)
            raise SystemExit(f"{message}. {takers} Take it out of the configuration.")
        _log_once(f"Left out: {message}.")


def _is_same(given: Any, value: Any) -> bool:
    """Return whether two values are equal, or the same class with options that do not contradict each other."""
    if isinstance(given, list) and isinstance(value, tuple):
        return tuple(given) == value
    if not isinstance(given, Namespace) or not isinstance(value, Namespace):
        return bool(given == value)
    options, others = (vars(spec.init_args) if "init_args" in spec else {} for spec in (given, value))
    consistent = all(_is_same(options[name], others[name]) for name in options.keys() & others.keys())
    return consistent and given.get("class_path") == value.get("class_path")


@cache
def _log_once(text: str) -> None:
    rank_zero_info(text)


_discard: Callable[[Any, Any, Any], None] = _typehints.discard_init_args_on_class_path_change
_typehints.discard_init_args_on_class_path_change = _discard_old_options
