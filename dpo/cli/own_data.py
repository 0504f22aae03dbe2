"""The class of the data, chosen by the path where the command line names none.

Files of one's own are for `PreferencePairs`; the layout of hh-rlhf is for `HHRLHF`, the default.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_info

from dpo.data.datamodule import QUICKSTART_NAME
from dpo.data.formats import DATA_FILE_SUFFIXES
from dpo.data.sources import why_no_hh_layout

_PATH_OPTIONS = ("--data.path", "--data.init_args.path")
_CLASS_OPTIONS = ("--data", "--data.class_path")
CHOSEN_CLASS = ["--data", "PreferencePairs"]


def choose_data_class(words: Sequence[str]) -> list[str]:
    """Return a command line that names `PreferencePairs` if it gives a path for it and names no other class.

    Args:
        words: Verb and options, with the paths of configurations as they are on disk.

    Raises:
        ValueError: The path does not tell what is to be done with it, or is no file that can be read.
    """
    path, named_class = (_last_value(words, options) for options in (_PATH_OPTIONS, _CLASS_OPTIONS))
    if named_class and named_class.endswith(DATA_FILE_SUFFIXES):
        raise ValueError(f"--data: expected a class such as PreferencePairs, got a file: --data.path {named_class}.")
    if path in (None, QUICKSTART_NAME) or named_class is not None:
        return list(words)
    assert path is not None
    if Path(path).expanduser().is_file() and not path.endswith(DATA_FILE_SUFFIXES):
        raise ValueError(f"--data.path {path}: expected a file that ends in {', '.join(DATA_FILE_SUFFIXES)}.")
    reason = why_no_hh_layout(path)
    if not reason or _configured_class(words) not in (None, "HHRLHF"):
        return list(words)
    if words[0] == "predict":
        raise ValueError(
            f"--data.path {path}: name what it holds, prompts to be answered (--data Prompts) or pairs to be scored "
            "(--data PreferencePairs)."
        )
    rank_zero_info(f"Data: PreferencePairs, as {path} is {reason} (--data names another class).")
    places = [place for place, word in enumerate(words) if word.startswith("--data.")]
    after = max((_config_end(words, place) for place in range(len(words))), default=0)
    named = list(words)
    for place in sorted({places[0], max(after, places[0])}, reverse=True):
        named[place:place] = CHOSEN_CLASS
    return named


def _last_value(words: Sequence[str], options: Sequence[str]) -> str | None:
    values = [value for place in range(len(words)) if (value := _value_at(words, place, options)) is not None]
    return values[-1] if values else None


def _value_at(words: Sequence[str], place: int, options: Sequence[str]) -> str | None:
    """Return the value of one of these options, if it begins here."""
    option, equals, value = words[place].partition("=")
    if option not in options:
        return None
    return value if equals else next(iter(words[place + 1 : place + 2]), "")


def _config_end(words: Sequence[str], place: int) -> int:
    """Return the place after the configuration that is named here; 0 if none is."""
    if _value_at(words, place, _config_options()) is None:
        return 0
    return place + 1 if "=" in words[place] else place + 2


def _config_options() -> list[str]:
    return ["-c", *("--config"[:length] for length in range(len("--co"), len("--config") + 1))]


def _configured_class(words: Sequence[str]) -> str | None:
    """Return the class of the data in the last configuration that names one, without its module."""
    names = []
    for place in range(len(words)):
        file = _value_at(words, place, _config_options())
        try:
            data = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("data") if file else None
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue  # whoever parses it says what is wrong
        name = data.get("class_path") if isinstance(data, dict) else data
        names += [str(name).rpartition(".")[2]] if name else []
    return names[-1] if names else None
