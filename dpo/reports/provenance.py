"""Of what a report speaks: hashes of data, weights, tokenizer and code, versions, and what training took."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dpo
from dpo.files import file_sha256
from dpo.reports.contents import RunContents
from dpo.runs.inventory import code_sha256, library_versions

Facts = list[tuple[str, str]]
"""Names and values, as text."""


def provenance(contents: RunContents) -> Facts:
    """Return hashes (SHA-256) and versions: what the run had loaded, as audit.json says, and what it has written.

    Where audit.json, of an earlier version, does not say, those of code and packages are of the moment of the report.
    """
    run = contents.run
    facts: Facts = [
        ("data", str(contents.option("data.init_args.path") or "not recorded")),
        ("policy before training", str(contents.option("model.init_args.policy") or "not recorded")),
        *(_loaded_hashes(contents.inventory) if contents.inventory else _checkpoint_hashes(run.checkpoint_folder)),
    ]
    exported = run.export_folder.glob("*") if run.export_folder.is_dir() else []
    files = [path for path in sorted(exported) if path.suffix == ".safetensors" or path.name == "tokenizer.json"]
    facts += [(f"export/{path.name}", file_sha256(path)) for path in files]
    facts += [(path.name, file_sha256(path)) for path in (run.config_path, run.audit_path) if path.is_file()]
    return [*facts, *_versions(contents.inventory)]


def _loaded_hashes(inventory: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the run had loaded: files of models and tokenizer, the reference in memory, and data."""
    for part in ("weights", "tokenizer"):
        for path, files in inventory[part].items():
            yield from ((f"{part} {path}/{name}", digest) for name, digest in files.items())
    if inventory["reference_sha256"]:
        yield "reference in memory", inventory["reference_sha256"]
    yield from ((f"data {file}", digest) for file, digest in inventory["data"].items())
    yield "training pairs", inventory["training_pairs_sha256"]


def _versions(inventory: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield code and libraries: those of the run, or those of now where it does not say."""
    if not inventory:
        yield f"code of dpo-lightning {dpo.__version__}, now", code_sha256()
        yield from ((f"{name}, installed now", number) for name, number in library_versions().items())
        return
    code = inventory["code"]
    yield f"code of dpo-lightning {code['version']}", code["sha256"]
    if code["commit"]:
        changed = len(code["changed"])
        yield "commit of the code", code["commit"] + (f", {changed} files changed since" if changed else "")
    yield from inventory["libraries"].items()


def _checkpoint_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the hashes that the last checkpoint holds; its tensors are not read."""
    path = folder / "last.ckpt"
    if not path.is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, ValueError):
        yield "last.ckpt", "cannot be read"
        return
    yield from sorted(_find_hashes(content))


def _find_hashes(values: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _find_hashes(value)
        elif isinstance(value, str) and "sha256" in str(name).lower().replace("-", "") and value:
            yield str(name).removeprefix("--").replace("_sha256", ""), value


def training_effort(contents: RunContents) -> Facts:
    """Return what training took, as far as metrics.csv says: steps, time, speed, memory, energy."""
    steps = contents.metrics["step"]
    facts: Facts = [("optimizer steps", f"{steps[-1]:.0f}" if len(steps) else "0")]
    _, seconds = contents.curve_of("seconds")
    if len(seconds):
        facts.append(("time from the start of training", f"{seconds[-1]:,.0f} s"))
    _, speeds = contents.curve_of("train/tokens_per_second")
    if len(speeds):
        facts.append(("tokens per second, median", f"{np.median(speeds):,.0f}"))
    for name in contents.metrics:
        _, values = contents.curve_of(name)
        if len(values) and ("memory" in name or "energy" in name):
            facts.append((f"{name}, largest", f"{values.max():,.4g}"))
    return facts
