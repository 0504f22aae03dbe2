"""Of what a report speaks: hashes of data, weights, tokenizer and code, versions, and what training took."""

import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dpo
from dpo.reports.contents import RunContents

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "datasets", "pyarrow", "peft")
CODE_SUFFIXES = (".py", ".yaml")
Facts = list[tuple[str, str]]
"""Names and values, as text."""


def provenance(contents: RunContents) -> Facts:
    """Return hashes (SHA-256) and versions; those of code and packages are of the moment of the report."""
    run = contents.run
    facts: Facts = [
        ("data", str(contents.option("data.init_args.path") or "not recorded")),
        ("policy before training", str(contents.option("model.init_args.policy") or "not recorded")),
        *_checkpoint_hashes(run.checkpoint_folder / "last.ckpt"),
    ]
    exported = run.export_folder.glob("*") if run.export_folder.is_dir() else []
    files = [path for path in sorted(exported) if path.suffix == ".safetensors" or path.name == "tokenizer.json"]
    facts += [(f"export/{path.name}", _file_sha256(path)) for path in files]
    facts += [(path.name, _file_sha256(path)) for path in (run.config_path, run.audit_path) if path.is_file()]
    facts.append((f"code of dpo-lightning {dpo.__version__}", code_sha256()))
    return [*facts, *_versions()]


def _checkpoint_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the hashes that a checkpoint holds; its tensors are not read."""
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


def code_sha256() -> str:
    """Return the SHA-256 of the package's source files, in the order of their names."""
    root = Path(dpo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in CODE_SUFFIXES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield f"{name}, installed now", version(name)
        except PackageNotFoundError:
            continue


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
