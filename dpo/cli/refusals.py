"""One line on what a command line got wrong, instead of jsonargparse's list of all types a value could have had.

That list is nested by indentation. `parse_refusal` reads it; `refusal_line` names the option, what it expects, what it
got, and what is spelled much like it.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any, get_args

import torch
import yaml

from dpo.cli.class_names import class_options, import_class, near_matches, offered_classes, option_takers
from dpo.cli.imports import ALLOW_IMPORT, KNOWN_PACKAGES
from dpo.cli.trl_names import counterpart_sentence

# What a line of jsonargparse's list may say; what none of these matches says nothing.
_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_GIVEN = re.compile(r"Given value: (.*)")
_SUBTYPES = re.compile(r"Subtypes: (.*)")
_NESTED = re.compile(r"NestedArg\(key='(.*?)', val=(.*)\)")
_NOISE = re.compile(r"Does not validate|Errors:|Given value type:|Expected a path but|Unable to load config '|$")

_REFUSED_OPTION = re.compile(r"(?:Option '|unrecognized arguments: --)([\w.]+)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S*) ?is abstract")
_UNKNOWN_CLASS = re.compile(r"(?:Expected a dot import (?:path )?string|Unexpected import path format): (.+)")
_OTHER_CLASS = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
_OWN_MESSAGE = re.compile(r"Not of type \w+: (.+)")
_WRONG_TYPE = re.compile(r"Expected a (?:<class '([\w.]+)'>|typing\.(Literal)\[(.*?)\])(?:\. Got value: (.*))?")
_OPTIONS_EXPECTED = re.compile(r'Unable to load config "(.*)"')
_UNRECOGNIZED = re.compile(r"(?:unrecognized arguments|ambiguous option): (\S+)")
_NOT_ACCEPTED = re.compile(r"(?:Subcommand|Group) '\S+' does not accept option '(\S+)'")
_NO_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+)(?:\S*): expected one argument")
_NO_MODULE = re.compile(r"No module named '.*'|module '.*' has no attribute '.*'|.*cannot import name.*")

_DENIED = re.compile(r".*Importing '([\w.]+)' is not allowed")

_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list [..., ...]",
    "tuple": "a list [..., ...]",
    "dict": "options {name: value}",
    "collections.abc.Iterable": "a list [..., ...]",
}
_NO_CHOICE = (type(None), torch.Tensor, Iterable)  # types of options that are not chosen by the name of a class
_NO_OPTIONS = {"params", "optimizer", "lr_scheduler", "args", "kwargs"}  # parameters that the program fills in
_PATH_OPTIONS = {"--data": "--data.path", "--model": "--model.policy"}
_CHOICES = {"--trainer.precision": "one of 32-true, bf16-mixed, 16-mixed"}  # fewer than Lightning has
Keys = tuple[str, ...]


@dataclass(frozen=True)
class ValueFault:
    """One of the reasons why a value was refused.

    Attributes:
        keys: The option, part by part: of the command line, of the class that it names, of the class in that, ...
        class_paths: The classes that the parts belong to, outermost first.
        reason: What jsonargparse says.
    """

    keys: Keys
    class_paths: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class RefusedValue:
    """Why jsonargparse refused a value.

    Attributes:
        faults: The reasons that it gives for the innermost option, one for each type of the option.
        given: The value, or None if it is not stated.
        types: Types of the option, as text.
    """

    faults: tuple[ValueFault, ...]
    given: str | None
    types: str

    @property
    def option(self) -> str:
        """The refused option as it is written on the command line."""
        return "--" + ".".join(self.faults[0].keys)

    def first_match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the match of the first fault whose reason a pattern matches."""
        return next(filter(None, (pattern.match(fault.reason) for fault in self.faults)), None)

    def accepted_classes(self) -> dict[str, type[Any]]:
        """Return the classes that can be chosen for the option, by name."""
        if self.types:
            names = re.findall(r"[\w.]+\.\w+", self.types)
            bases = [locate(name) or import_class(name) for name in names]
        else:
            parameter = class_options(self.faults[0].class_paths[-1]).get(self.faults[0].keys[-1])
            bases = list(get_args(parameter.annotation) or [parameter.annotation]) if parameter else []
        chosen = [base for base in bases if isinstance(base, type) and base not in _NO_CHOICE]
        found = {cls.__name__: cls for base in chosen for cls in offered_classes(base)}
        return dict(sorted(found.items()))


def parse_refusal(message: str) -> RefusedValue | None:
    """Return why a value was refused from jsonargparse's message, or None if the message is of another kind."""
    stack: list[tuple[int, str, str]] = []  # indentation, "key" or "class", name
    faults: list[ValueFault] = []
    given: dict[Keys, str] = {}
    types: dict[Keys, str] = {}
    for line in filter(str.strip, message.splitlines()):
        indentation, text = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        stack = [entry for entry in stack if entry[0] < indentation]
        for kind, pattern in (("key", _KEY), ("class", _CLASS)):
            if match := pattern.match(text):
                stack.append((indentation, kind, match[1]))
                text = match[2]
        keys, class_paths = (tuple(name for _, each, name in stack if each == kind) for kind in ("key", "class"))
        if stated := _GIVEN.match(text) or _SUBTYPES.match(text):
            (given if stated.re is _GIVEN else types)[keys] = stated[1]
        elif not _NOISE.match(text):
            faults.append(ValueFault(keys, class_paths, text))
    faults = [fault for fault in faults if fault.keys]
    if not faults:
        return None
    deepest = max(faults, key=lambda fault: len(fault.keys) + len(fault.class_paths)).keys
    return RefusedValue(tuple(f for f in faults if f.keys == deepest), given.get(deepest), types.get(deepest, ""))


def refusal_line(message: str) -> str:
    """Return what is wrong in one line; a message that is no list of types keeps its words."""
    refusal = parse_refusal(message)
    line = next(filter(None, (describe(refusal) for describe in _DESCRIPTIONS)), "") if refusal else ""
    return line or " ".join(message.split())


def _describe_option(refusal: RefusedValue) -> str:
    match = refusal.first_match(_REFUSED_OPTION)
    if not match:
        return ""
    fault = next(fault for fault in refusal.faults if _REFUSED_OPTION.match(fault.reason))
    option, class_path = match[1].partition(".")[0], fault.class_paths[-1]
    problem = f"{refusal.option}.{option}: {class_path.rpartition('.')[2]} has no option '{option}'."
    options = class_options(class_path)
    if option not in options and (counterpart := counterpart_sentence(option)):
        return f"{problem} {option_takers(class_path, option) or counterpart}"
    own = ", ".join(name for name in options if name not in _NO_OPTIONS)
    return f"{problem} {option_takers(class_path, option) or near_matches(option, options) or f'It takes {own}.'}"


def _describe_required(refusal: RefusedValue) -> str:
    match = refusal.first_match(_REQUIRED)
    if not match:
        return ""
    fault = next(fault for fault in refusal.faults if _REQUIRED.match(fault.reason))
    needed = " and ".join(f"{refusal.option}.{name}" for name in match[1].split(", "))
    return f"{refusal.option}: expected {needed}, which {fault.class_paths[-1].rpartition('.')[2]} needs, got none."


def _describe_abstract(refusal: RefusedValue) -> str:
    match = refusal.first_match(_ABSTRACT)
    if not match:
        return ""
    classes = refusal.accepted_classes()
    if nested := _NESTED.match(refusal.given or ""):
        classes = {name: cls for name, cls in classes.items() if nested[1] in inspect.signature(cls).parameters}
        return f"{refusal.option}.{nested[1]}: expected {refusal.option} {_either(classes)} before it, got none."
    name = match[1] or refusal.given or "one"
    lacking = sorted(getattr(locate(name), "__abstractmethods__", ()))
    remark = f", which is abstract (it does not define {', '.join(lacking)})" if lacking else ", which is abstract"
    return f"{refusal.option}: expected {_either(classes)}, got {name.rpartition('.')[2]}{remark}."


def _describe_denied(refusal: RefusedValue) -> str:
    match = refusal.first_match(_DENIED)
    if not match:
        return ""
    module = match[1].rpartition(".")[0]
    return (
        f"{refusal.option}: expected a class of a known package ({', '.join(KNOWN_PACKAGES)}), got {match[1]!r}, which "
        f"is not imported. If it is yours: {ALLOW_IMPORT} {module}."
    )


def _describe_import(refusal: RefusedValue) -> str:
    fault = next((fault for fault in refusal.faults if _NO_MODULE.match(fault.reason)), None)
    if not fault or not fault.class_paths:
        return ""
    given = fault.class_paths[-1]
    outer = RefusedValue((ValueFault(fault.keys, fault.class_paths[:-1], ""),), None, refusal.types)
    return _expected_class(outer, given, f" ({fault.reason})")


def _describe_class(refusal: RefusedValue) -> str:
    match = refusal.first_match(_UNKNOWN_CLASS)
    if match and refusal.accepted_classes():
        return _expected_class(refusal, match[1])
    if other := refusal.first_match(_OTHER_CLASS):
        return _expected_class(refusal, other[1] or refusal.given or "", ", which is of another kind")
    return ""


def _expected_class(refusal: RefusedValue, given: str, remark: str = "") -> str:
    classes = refusal.accepted_classes()
    if refusal.option in _PATH_OPTIONS and re.search(r"/|\.(jsonl?|csv|parquet|arrow|gz|tsv|txt)$", given):
        remark += f". The option for a path is {_PATH_OPTIONS[refusal.option]}"
    names = [*_type_words(refusal), _either(classes)]
    hint = "" if remark else near_matches(given, classes)
    return f"{refusal.option}: expected {' or '.join(names)}, got {given!r}{remark}. {hint}".rstrip()


def _describe_own_message(refusal: RefusedValue) -> str:
    match = refusal.first_match(_OWN_MESSAGE)
    return f"{refusal.option}: {match[1]}." if match else ""


def _describe_options_expected(refusal: RefusedValue) -> str:
    match = refusal.first_match(_OPTIONS_EXPECTED)
    if not match:
        return ""
    return f"{refusal.option}: expected options, as in {refusal.option}.NAME VALUE, got {match[1]!r}."


def _describe_type(refusal: RefusedValue) -> str:
    words = _type_words(refusal)
    if not words:
        return ""
    matches = [match for fault in refusal.faults if (match := _WRONG_TYPE.match(fault.reason))]
    given = next((match[4] for match in matches if match[4]), refusal.given)
    nested = _NESTED.match(given or "")
    value = nested[2] if nested else repr(given)
    line = f"{refusal.option}: expected {' or '.join(words)}, got {value}."
    is_one_of_a_list = any("list" in word for word in words) and re.fullmatch(r"[\w./-]+", given or "")
    return f"{line} Write '[{given}]' for a list of one." if is_one_of_a_list else line


_DESCRIPTIONS = (
    _describe_denied,
    _describe_option,
    _describe_required,
    _describe_abstract,
    _describe_own_message,
    _describe_import,
    _describe_class,
    _describe_options_expected,
    _describe_type,
)


def _type_words(refusal: RefusedValue) -> list[str]:
    if refusal.option in _CHOICES:
        return [_CHOICES[refusal.option]]
    words: dict[str, None] = {}
    for fault in refusal.faults:
        if match := _WRONG_TYPE.match(fault.reason):
            if match[2]:
                words[f"one of {match[3]}".replace("'", "")] = None
            elif match[1] in _TYPE_WORDS:
                words[_TYPE_WORDS[match[1]]] = None
    if {"a number", "a whole number"} <= words.keys():
        del words["a whole number"]
    return list(words)


def _either(names: Iterable[str]) -> str:
    listed = list(names)
    return f"one of {', '.join(listed)}" if len(listed) > 1 else "".join(listed)


def read_config(path: str) -> Any:
    """Return the content of a configuration, or None if the file cannot be read as YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def config_fault(path: str) -> str:
    """Return what is wrong with a configuration as a file, or nothing."""
    if not Path(path).is_file():
        return f"--config: expected a file, got {path!r}, which is none." if path else ""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        return f"--config: expected YAML, got {path}: {_yaml_problem(error)}."
    if isinstance(content, dict):
        return ""
    kind = "is empty" if content is None else f"holds a {type(content).__name__}"
    return f"--config: expected options (name: value), got {path}, which {kind}."


def _yaml_problem(error: Exception) -> str:
    return " ".join(str(error).replace('  in "<unicode string>", ', " at ").split())


def unknown_option_line(message: str, words: Sequence[str], known: Sequence[str]) -> str:
    """Return one line on an option that does not exist or has no value, or nothing if the message is of another kind.

    Args:
        message: What argparse or jsonargparse says.
        words: The command line.
        known: All options.
    """
    if match := _NO_VALUE.match(message):
        valueless = [
            word
            for word, after in zip(words, [*words[1:], "--"], strict=True)
            if re.match(f"{match[1]}([.+]|$)", word) and after.startswith("--")
        ]
        return f"{(valueless or [match[1]])[0]}: expected a value after it, got none."
    match = _UNRECOGNIZED.match(message) or _NOT_ACCEPTED.match(message)
    if not match:
        return ""
    option = match[1].partition("=")[0]
    if match.re is _UNRECOGNIZED and not option.startswith("-"):
        return f"expected options (--name value), got {option!r}. {near_matches(option, known)}".rstrip()
    name = option.lstrip("-").replace("-", "_")
    known_as = f"--{name}" if match.re is _UNRECOGNIZED else name
    if counterpart := counterpart_sentence(name):
        return f"{known_as}: there is no such option. {counterpart}"
    return f"{option}: there is no such option. {_similar_options(name, known)}".rstrip()


def _similar_options(name: str, known: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    same = [option for option in known if option.lstrip("-").rpartition(".")[2] == last]
    if same:
        return f"Did you mean {' or '.join(same)}?"
    whole = near_matches(f"--{name}", known) if "." in name else ""
    if whole:
        return whole
    by_last = {option.rpartition(".")[2].lstrip("-"): option for option in reversed(known)}
    near = get_close_matches(last, by_last, cutoff=0.6)
    return f"Did you mean {' or '.join(by_last[each] for each in near)}?" if near else ""


def name_option(message: str, words: Sequence[str]) -> str:
    """Return a message with the option before it that it is about, if the message leaves that out.

    Args:
        message: What a class or Lightning says of an option or a value.
        words: The command line.
    """
    if message.startswith("--"):
        return message
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        name = option.rpartition(".")[2]
        if not option.startswith("--"):
            continue
        if message.startswith(f"{name}: "):
            return message.replace(name, option, 1)
        names_it = re.search(rf"\b{re.escape(name)}\b", message) and "_" in name
        if names_it or f"'{value if equals else after}'" in message or f"`{name}`" in message:
            return f"{option}: {message}"
    return message
