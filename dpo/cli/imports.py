"""Which modules a command line or a configuration may have imported: known packages, and what ``--allow-import`` names.

A class that a configuration names is imported, which runs its module, and a function that it names is called in
training. A configuration from elsewhere must not decide that, so only the command line can allow more.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

ALLOW_IMPORT = "--allow-import"
KNOWN_PACKAGES = ["dpo", "lightning", "torch", "torchmetrics", "transformers", "peft", "bitsandbytes", "wandb"]

_LINKED = re.compile(r"^model\.(?=lr_scheduler|optimizer)")  # options that the model takes under its own name


def split_allowed_modules(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line without its ``--allow-import`` options, and the modules that these name.

    Raises:
        ValueError: One of them has no value that is the name of a module.
    """
    rest, modules = [], []
    following = iter(words)
    for word in following:
        option, equals, value = word.partition("=")
        if option not in (ALLOW_IMPORT, ALLOW_IMPORT.replace("w-", "w_")):
            rest.append(word)
            continue
        module = value if equals else next(following, "")
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"{ALLOW_IMPORT}: expected the name of a module, as in {ALLOW_IMPORT} my, got {module!r}.")
        modules.append(module)
    return rest, modules


def limit_imports(modules: Sequence[str]) -> None:
    """Let jsonargparse import from known packages and these modules, which may lie in the working folder, only."""
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*KNOWN_PACKAGES, *modules])
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing there may take the place of another module


def refuse_functions(config: Namespace, modules: Sequence[str]) -> None:
    """Refuse a function as the value of an option, which would be called, unless its module is allowed.

    Raises:
        ValueError: There is one.
    """
    for option, value in _leaves(config, ()):
        module = getattr(value, "__module__", None) or "builtins"
        is_allowed = any(f"{module}.".startswith(f"{allowed}.") for allowed in modules)
        if inspect.isroutine(value) and not is_allowed:
            name = f"{module}.{getattr(value, '__name__', value)}"
            raise ValueError(
                f"--{_LINKED.sub('', option)}: expected no function, as it would be called, got {name}. To allow your "
                f"own: {ALLOW_IMPORT} {module.partition('.')[0]}."
            )


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Namespace | dict):
        for key, below in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _leaves(below, keys if key == "init_args" else (*keys, str(key)))
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _leaves(below, keys)
    else:
        yield ".".join(keys), value
