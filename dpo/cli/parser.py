"""Parsing of the training command line: configurations by name, classes by name, and errors that say what was meant.

jsonargparse does the parsing. What is added here: configurations that come with the package, class paths of earlier
versions, near misses in error messages, and that no option is dropped silently when one class takes another's place.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from dpo.cli.class_names import class_options, option_takers
from dpo.cli.refusals import (
    config_fault,
    name_option,
    read_config,
    refusal_line,
    unknown_option_line,
)
from dpo.files import describe_os_error
from dpo.secrets import conceal

PACKAGE = Path(__file__).parents[1]
# Inside the package when it was installed from a wheel, beside it in a checkout.
CONFIG_FOLDER = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
WHAT_TO_TRAIN = ("--model.policy", "--data.path")

# Where classes of configurations were in earlier versions; they are all named from `dpo` now.
_OLD_CLASS_PATH = re.compile(r"\bdpo\.(?:adapters|cached|data|module|prompts|reference|schedules|sft)\.([A-Z]\w*)")
_OLD_PRECISION = "dpo.precision.bfloat16_where_fast"

_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf", re.I)
# Classes whose options are shown where an option asks for help and names no class.
_HELP_CLASSES = {
    "--model.help": "DPO",
    "--model.loss.help": "DPO",
    "--model.reference.help": "Copy",
    "--data.help": "HHRLHF",
    "--optimizer.help": "AdamW",
    "--lr_scheduler.help": "Warmup",
}
_CLASS_OPTIONS = {  # the classes by whose options an unknown one is looked for
    "--model": "dpo.DPO",
    "--model.loss": "dpo.losses.DPO",
    "--data": "dpo.HHRLHF",
    "--optimizer": "torch.optim.AdamW",
    "--lr_scheduler": "dpo.Warmup",
}
# Roles with their target, literals, and links.
_SPHINX = re.compile(r":[a-z]+:`~?(?:[^`]*?\.)?(\w+)`|``([^`]*)``|`([^`<]+?)\s*<[^>`]*>`_+")
_HELP_EPILOG = """\
Options of the classes that do the work (with --model.loss IPO and the like, those of another class):
  --model.help [CLASS]         stages: DPO, SFT
  --model.loss.help [CLASS]    losses; `python -m dpo losses` lists them with their formulas
  --model.adapter.help CLASS   AsLoaded, LoRA, QLoRA
  --model.reference.help CLASS Copy, Model, Cached, Moving, AdapterOff, Nothing
  --data.help [CLASS]          data: HHRLHF, PreferencePairs, Prompts (predict)
  --optimizer.help [CLASS]     optimizers of torch.optim
  --lr_scheduler.help [CLASS]  Warmup, and the schedules of torch
Classes and functions of your own are imported only if their module is named:
  --model.loss my.Loss --allow-import my
"""


def complete_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the quickstart where nothing is named, and with packaged configurations found.

    A ``fit`` that names neither configuration nor policy nor data gets the quickstart's configuration.
    """
    words = _join_negative_numbers(_name_help_classes([_translate(word) for word in arguments]))
    quickstart = str(CONFIG_FOLDER / "quickstart.yaml")
    if words[:1] == ["fit"] and not any(map(_names_what_to_train, words)):
        words[1:1] = ["--config", quickstart]
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if _is_config(option) and value:
            words[place] = f"{option}={find_config(value)}"
        elif place and _is_config(words[place - 1]):
            words[place] = find_config(word)
    overlays = config_paths(words)
    if words[:1] == ["fit"] and overlays and not any(map(_names_policy_or_data, words)) and _are_overlays(overlays):
        rank_zero_info(f"{', '.join(overlays)}: names neither policy nor data, so {quickstart} lies under it.")
        words[1:1] = ["--config", quickstart]
    return words


def _name_help_classes(words: list[str]) -> list[str]:
    """Give an option that asks for help, and is followed by no class, the class that is used by default."""
    following = [*words[1:], "--"]
    return [
        f"{word}={_HELP_CLASSES[word]}" if word in _HELP_CLASSES and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def _join_negative_numbers(words: list[str]) -> list[str]:
    """Join an option and the negative number after it, which argparse would take for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _NUMBER.fullmatch(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def config_paths(words: Sequence[str]) -> list[str]:
    """Return the configurations that a command line names."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    values = ((word.partition("="), after) for word, after in pairs if _is_config(word.partition("=")[0]))
    return [value if equals else after for (_, equals, value), after in values]


def _are_overlays(paths: Sequence[str]) -> bool:
    """Return whether all configurations can be read and none of them names a policy or data."""
    contents = [read_config(path) for path in paths]
    return all(isinstance(content, dict) and not _chooses_policy_or_data(content) for content in contents)


def _chooses_policy_or_data(content: dict[str, Any]) -> bool:
    model = content.get("model")
    options = model if isinstance(model, dict) else {}
    return "data" in content or "policy" in {**options, **(options.get("init_args") or {})} or isinstance(model, str)


def _is_config(option: str) -> bool:
    return option == "-c" or (len(option) > len("--c") and "--config".startswith(option))  # argparse takes prefixes


def _names_what_to_train(word: str) -> bool:
    return _names_policy_or_data(word) or _is_config(word.partition("=")[0])


def _names_policy_or_data(word: str) -> bool:
    return word.partition("=")[0].replace(".init_args.", ".") in WHAT_TO_TRAIN


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
    """Return what is wrong in plain words, without jsonargparse's list of all types that a value could have had."""
    if "Union subtypes" in str(error):
        return error_message(error.__cause__) if error.__cause__ else conceal(refusal_line(str(error)))
    if isinstance(error, OSError):
        return conceal(describe_os_error(error))
    return conceal(name_option(str(error).strip(), sys.argv)) or type(error).__name__


class HintingParser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line that names the option, what was expected and close matches."""

    failed_config = ""  # name of the configuration that could not be applied

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message of one line; parsers within this one raise jsonargparse's own, which is read here."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        line = unknown_option_line(message, sys.argv, _known_options(parser)) or refusal_line(message)
        faults = filter(None, map(config_fault, config_paths(sys.argv)))
        line = next(faults, line)
        place = f" (In {self.failed_config}.)" if self.failed_config and self.failed_config not in line else ""
        super().error(conceal(line + place), ex)

    def _load_config_parser_mode(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Namespace:
        try:
            return super()._load_config_parser_mode(_translate(content), path, *args, **kwargs)
        except (TypeError, KeyError, ArgumentError):
            names = [name for name in config_paths(sys.argv) if Path(name).name == str(path)]
            self.failed_config = (names or [str(path)])[-1]
            raise

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the usage of all options would stand before every message, which names ``--help``."""

    def format_help(self, *args: Any) -> str:
        """Return the help without marks of Sphinx, and with where the options of classes are shown."""
        for action in self._actions:
            if isinstance(action.help, str):
                action.help = _SPHINX.sub(lambda match: next(filter(None, match.groups()), ""), action.help)
        text = super().format_help(*args)
        return f"{text}\n{_HELP_EPILOG}" if "--trainer.max_steps" in text else text


def _known_options(parser: Any) -> list[str]:
    """Return the options of a parser, and those of the classes that are chosen by default."""
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for prefix, class_path in _CLASS_OPTIONS.items():
        if prefix.split(".")[0] in options:
            options += [f"{prefix}.{name}" for name in class_options(class_path)]
    return [option for option in options if not option.endswith(("+", ".help", ".optimizer", ".lr_scheduler"))]


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
            takers = option_takers(before.class_path, name)
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
