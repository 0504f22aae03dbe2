"""What a run has loaded: weights, tokenizer, data and code, each with its SHA-256, and versions of libraries.

It is the entry ``loaded`` of audit.json, beside the counts of every split.
"""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

import dpo
from dpo.files import file_sha256
from dpo.models.loading import adapter_base_model, resolve_model_path
from dpo.runs.folder import Run

LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "peft", "numpy")
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
CODE_SUFFIXES = (".py", ".yaml")
GIT_SECONDS = 10  # longest wait for an answer of git
_KEY = "loaded"


def read_audit(run: Run) -> dict[str, Any]:
    """Return the counts in audit.json by split; nothing if there is none."""
    return {split: counts for split, counts in _read(run).items() if split != _KEY}


def read_inventory(run: Run) -> dict[str, Any]:
    """Return what a run has loaded; nothing if its audit.json, of an earlier version, does not say."""
    inventory: dict[str, Any] = _read(run).get(_KEY, {})
    return inventory


def _read(run: Run) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(run.audit_path.read_text(encoding="utf-8")) if run.audit_path.is_file() else {}
    return stored


def audit_json(counts_by_split: dict[str, Any], inventory: dict[str, Any]) -> str:
    """Return the text of audit.json."""
    return json.dumps({**counts_by_split, _KEY: inventory}, indent=2) + "\n"


def hash_model_files(paths: Sequence[str], patterns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of files of models, and of those that adapters are for, by path and name.

    Every byte is read, at the speed of the disk or of SHA-256 (about 1 GB/s), whichever is slower.

    Args:
        paths: Folders or hub ids of models that have been read.
        patterns: Patterns of the names of files.
    """
    hashes: dict[str, dict[str, str]] = {}
    for path in paths:
        while path and path not in hashes:
            folder = find_model_folder(path)
            found = {file for pattern in patterns for file in folder.glob(pattern)} if folder else ()
            hashes[path] = {file.name: file_sha256(file) for file in sorted(found) if file.is_file()}
            path = adapter_base_model(path) or ""
    return hashes


def find_model_folder(path: str) -> Path | None:
    """Return the folder of a model, in the hub's cache for a hub id; None if it is not on this machine."""
    folder = Path(resolve_model_path(path))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):  # neither a folder nor in the cache
        return None


def code_state() -> dict[str, Any]:
    """Return version and SHA-256 of this package and, in a checkout of git, its commit and changed files."""
    folder = Path(dpo.__file__).parent
    tracked = _ask_git(folder, "ls-files", "--error-unmatch", Path(dpo.__file__).name) is not None
    changes = (_ask_git(folder, "status", "--porcelain", "--", ".") or "") if tracked else ""
    return {
        "version": dpo.__version__,
        "sha256": code_sha256(),
        "commit": _ask_git(folder, "rev-parse", "HEAD") if tracked else None,
        "changed": [line[3:] for line in changes.splitlines()],
    }


def _ask_git(folder: Path, *words: str) -> str | None:
    """Return what git prints; None if there is no git, or it fails: the folder is in no checkout."""
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None


def code_sha256() -> str:
    """Return the SHA-256 of the package's source files, in the order of their names."""
    root = Path(dpo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in CODE_SUFFIXES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on, of those that are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
