"""Upload of a run's export to a model repository on the Hugging Face Hub.

Only files that belong to an export are uploaded, chosen by name: no checkpoints, no logs, and nothing that contains
what looks like a secret.
"""

import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import HTTPError

from dpo.secrets import MIN_SECRET_LENGTH, SECRET_VARIABLE_PATTERN

# The files that transformers saves, and those that a run's export adds.
UPLOAD_PATTERNS = (
    "README.md",
    "LICENSE",
    "config.json",
    "train_config.yaml",
    "origin.json",
    "generation_config.json",
    "results.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# Formats of the keys of common services.
SECRET_PATTERNS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a Weights & Biases key": rb"\bwandb_v\d+_\w{20,}",
    "an API key": rb"\b(sk-[\w-]{32,}|gh[opsru]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16})\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}

NO_TOKEN_MESSAGE = (
    "No Hugging Face token was found: create one with write access at https://huggingface.co/settings/tokens, "
    "then run `hf auth login` or set HF_TOKEN."
)


def export_files(run_folder: Path) -> list[Path]:
    """Return the files of a run's export that may be uploaded, and print the names of the others.

    Raises:
        ValueError: The export is missing or incomplete, or something in it links to a place outside of it.
    """
    export = run_folder.resolve() / "export"
    entries = sorted(export.rglob("*"))
    for entry in (export, *entries):
        if entry.is_symlink() and not entry.resolve().is_relative_to(export):
            raise ValueError(f"{entry} links to a place outside of the export: replace the link by the file itself.")
    all_files = [entry for entry in entries if entry.is_file()]
    folders = {".": UPLOAD_PATTERNS, EVAL_RESULTS_FOLDER: ("*.yaml",)}
    patterns = {file: folders.get(str(file.parent.relative_to(export)), ()) for file in all_files}
    files = [file for file in all_files if any(map(file.match, patterns[file]))]
    names = {file.name for file in files}
    if not {"README.md", "config.json"} <= names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"Expected a model card, a configuration and weights in {export}, found {sorted(names) or 'nothing'}: "
            "`python train.py fit` writes them at the end of a run."
        )
    skipped = [str(file.relative_to(export)) for file in all_files if file not in files]
    if skipped:
        print(f"Not uploaded, because they are not part of an export: {', '.join(skipped)}")
    return files


def refuse_secrets(files: Sequence[Path], environment: Mapping[str, str]) -> None:
    """Refuse files that contain what looks like a key, or the value of an environment variable named like one.

    Raises:
        ValueError: A file does. The message names the file and the kind of secret, never the secret itself.
    """
    for file in files:
        secret_kind = next(_secrets_in(_searchable_bytes(file), environment), None)
        if secret_kind:
            raise ValueError(f"{file} contains {secret_kind}. Nothing was uploaded: remove it and push again.")


def _searchable_bytes(file: Path) -> bytes:
    """Return a file's bytes; of safetensors only the header, which holds tensor names and free-form metadata."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else -1
        return stream.read(size)


def _secrets_in(content: bytes, environment: Mapping[str, str]) -> Iterator[str]:
    yield from (f"what looks like {kind}" for kind, pattern in SECRET_PATTERNS.items() if re.search(pattern, content))
    for name, value in environment.items():
        if SECRET_VARIABLE_PATTERN.search(name) and len(value) >= MIN_SECRET_LENGTH and value.encode() in content:
            yield f"the value of the environment variable {name}"


def push(run_folder: Path, repo_id: str, *, private: bool, api: HfApi) -> str:
    """Upload a run's export in one commit, so that the repository has all of it or nothing.

    Args:
        run_folder: Folder of a finished run, ``runs/<name>``.
        repo_id: The repository, ``user/name``; it is created if it does not exist.
        private: Make the repository visible to its owner only; an existing public one is refused.
        api: Client of the hub, with its address and token.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The export cannot be published (see `export_files` and `refuse_secrets`), `repo_id` is not the name
            of a repository, or the repository is public although `private` was asked for.
        OSError: The hub refused the request or could not be reached.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"Expected a repository `user/name`, got {repo_id!r}.")
    files = export_files(run_folder)
    refuse_secrets(files, os.environ)
    try:
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repository).private:
            raise ValueError(f"{repository} exists and is public. Nothing was uploaded: choose another name.")
        # Not HfApi.upload_folder, which with hf_xet may upload in several commits.
        export = run_folder.resolve() / "export"
        paths = {str(file.relative_to(export)): file for file in files}
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in paths.items()]
        return api.create_commit(repository, operations, commit_message="Upload policy").commit_url
    except (HTTPError, OSError, RuntimeError) as error:
        # huggingface_hub raises RuntimeError when the upload of a single file fails; its cause says why.
        reason = error.__cause__ or error
        raise OSError(f"The upload to {repo_id} at {api.endpoint} failed: {reason}") from error


def main(arguments: Sequence[str]) -> None:
    """Upload a run's export, with its model card, to the Hugging Face hub."""
    parser = ArgumentParser(
        prog="dpo push",
        description=main.__doc__,
        epilog="Set HF_ENDPOINT to use another hub, and HF_HUB_DISABLE_XET=1 if it has no Xet storage.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, runs/<name>")
    parser.add_argument("--to", required=True, help="repository, user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository visible only to you")
    options = parser.parse_args(arguments)
    export_files(options.run)  # a run that is not there is named before a token that is not
    token = get_token()
    if token is None:
        raise ValueError(NO_TOKEN_MESSAGE)
    print(push(options.run, options.to, private=options.private, api=HfApi(token=token)))
