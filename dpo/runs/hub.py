"""A run's export -> a model repository on the Hugging Face hub.

Takes the folder of a finished run and the name of a repository; gives the address of the commit. Uploads what
an export consists of, by name, and nothing else: no checkpoint, no log, no file with something like a secret
in it. It does not know models or training.
"""

import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HTTPError

# The files of a Hugging Face folder, and the configuration and results that our export adds.
UPLOAD_PATTERNS = (
    "README.md",
    "LICENSE",
    "config.json",
    "train_config.yaml",
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

# What keys of services look like, wherever they come from.
SECRET_PATTERNS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a Weights & Biases key": rb"\bwandb_v\d+_\w{20,}",
    "an API key": rb"\b(sk-[\w-]{32,}|gh[opsru]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16})\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET_VARIABLE_PATTERN = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
MIN_SECRET_LENGTH = 16  # characters; a shorter value of a variable may be an ordinary word

NO_TOKEN_MESSAGE = (
    "No Hugging Face token was found: make one with write access at https://huggingface.co/settings/tokens, "
    "then run `hf auth login` or set HF_TOKEN."
)


def export_files(run_folder: Path) -> list[Path]:
    """Find the files of a run's export that may be uploaded; the others are named on standard output.

    Raises:
        ValueError: There is no finished export, or something in it links to a place outside of it.
    """
    export = run_folder.resolve() / "export"
    entries = sorted(export.rglob("*"))
    for entry in (export, *entries):
        if entry.is_symlink() and not entry.resolve().is_relative_to(export):
            raise ValueError(f"{entry} links to a place outside of the export: put the file itself there.")
    everything = [entry for entry in entries if entry.is_file()]
    files = [f for f in everything if f.parent == export and any(fnmatchcase(f.name, p) for p in UPLOAD_PATTERNS)]
    names = {file.name for file in files}
    if not {"README.md", "config.json"} <= names or not any(n.endswith(".safetensors") for n in names):
        raise ValueError(
            f"Expected a card, a configuration and weights in {export}, found {sorted(names) or 'nothing'}: "
            "`python train.py fit` writes them at the end of a run."
        )
    left_out = [str(file.relative_to(export)) for file in everything if file not in files]
    if left_out:
        print(f"Left out, no part of an export: {', '.join(left_out)}")
    return files


def refuse_secrets(files: Sequence[Path], environment: Mapping[str, str]) -> None:
    """Check that no file holds what looks like a key, or the value of a variable that is named like one.

    Raises:
        ValueError: One does. The message names the file and the kind of secret, never the secret.
    """
    for file in files:
        text = _text(file)
        for kind in _secrets_in(text, environment):
            raise ValueError(f"{file} holds {kind}. Nothing was uploaded: take it out and push again.")


def _text(file: Path) -> bytes:
    """A file's bytes; of safetensors only the header, which holds names and free metadata."""
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            return stream.read(int.from_bytes(stream.read(8), "little"))
        return stream.read()


def _secrets_in(text: bytes, environment: Mapping[str, str]) -> Iterator[str]:
    yield from (f"what looks like {kind}" for kind, pattern in SECRET_PATTERNS.items() if re.search(pattern, text))
    for name, value in environment.items():
        if SECRET_VARIABLE_PATTERN.search(name) and len(value) >= MIN_SECRET_LENGTH and value.encode() in text:
            yield f"the value of the environment variable {name}"


def push(run_folder: Path, repo_id: str, *, private: bool, api: HfApi) -> str:
    """Upload a run's export in one commit: all of it is there afterwards, or nothing.

    Args:
        run: folder of a finished run, `runs/<name>`.
        to: repository, `user/name`; it is made if it does not exist.
        private: only the owner sees it. An existing public repository is refused then, not used.
        api: the hub, with its address and token.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The export is not fit for publication (`export_files`, `refuse_secrets`), or `to` is no
            repository's name, or is public although `private` was asked for.
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
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        return api.create_commit(repository, operations, commit_message="Upload policy").commit_url
    except (HTTPError, OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # a file's upload fails as RuntimeError with the reason behind it
        raise OSError(f"The upload to {repo_id} at {api.endpoint} failed: {reason}") from error


def main(arguments: Sequence[str]) -> None:
    """Upload a run's export, with its model card, to the Hugging Face hub."""
    parser = ArgumentParser(
        prog="python -m dpo push",
        description=main.__doc__,
        epilog="HF_ENDPOINT names another hub; for one without Xet storage set HF_HUB_DISABLE_XET=1 as well.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, runs/<name>")
    parser.add_argument("--to", required=True, help="repository, user/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="only you can see the repository")
    options = parser.parse_args(arguments)
    token = get_token()
    if token is None:
        raise ValueError(NO_TOKEN_MESSAGE)
    print(push(options.run, options.to, private=options.private, api=HfApi(token=token)))
