"""`python -m dpo from-trl config.yaml`: a DPO configuration of TRL, LLaMA-Factory or Axolotl in this project's options.

Nothing is dropped silently: what has no counterpart, and what differs, is listed on stderr and in comments of the
result.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo.cli.trl_conversion import convert_config, one_line
from dpo.files import write_atomically


def main(arguments: Sequence[str]) -> None:
    """Write the configuration to stdout or to a file, and what differs to stderr, too.

    Raises:
        ValueError: The file is no configuration of preference training.
    """
    parser = argparse.ArgumentParser(
        "python -m dpo from-trl",
        description="Convert a DPO configuration of TRL, LLaMA-Factory or Axolotl. What has no counterpart is listed.",
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file, as for `trl dpo --config`, `llamafactory-cli train` or `axolotl train`")
    add("--to", type=Path, help="file to write (default: stdout)")
    add("--devices", type=int, default=1, help="devices it was written for, over all machines (%(default)s)")
    add("--pairs", type=int, help="number of training pairs, which gives the number of steps (default: not known)")
    options = parser.parse_args(arguments)
    for name in ("devices", "pairs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {getattr(options, name)}.")
    config, remarks, left_out = convert_config(_read_yaml(options.config), options.devices, options.pairs)
    lines = [*remarks, *(["Left out:", *(f"  {line}" for line in left_out)] if left_out else [])]
    print("\n".join(lines), file=sys.stderr)
    comments = "".join(f"# {line}\n" for line in lines)
    text = comments + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if options.to is None:
        print(text, end="")
        return
    with write_atomically(options.to) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a YAML mapping of options, got {one_line(content)}.")
    return content
