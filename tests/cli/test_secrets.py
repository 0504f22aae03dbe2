"""Twelve planted secrets are found in nothing that a run writes or prints, and the run can be resumed."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpo.runs.folder import Run
from dpo.secrets import conceal, hide_address, is_secret_option, reveal_address
from tests.support.runs import ROOT, Lab, rows

ENVIRONMENT = {  # none of them works anywhere
    "HF_TOKEN": "hf_PlantedOneAbcdefghijklmnopqrstuv",
    "WANDB_API_KEY": "planted2" + "0123456789abcdef" * 2,
    "AWS_SECRET_ACCESS_KEY": "PlantedThree/K7MDENG/bPxRfiCYEXAMPLE",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDFOUR0000X",
    "OPENAI_API_KEY": "sk-plantedfive-0123456789abcdefghijkl",
    "GITHUB_TOKEN": "ghp_plantedsix0123456789abcdefghijklmn",
    "DATABASE_PASSWORD": "planted-seven-correct-horse",
}
PASSWORD, TOKEN, API_KEY, KEY_ID, STORAGE = "pw8planted", "tok9planted", "key10planted", "key11planted", "sec12planted"
SECRETS = [*ENVIRONMENT.values(), PASSWORD, TOKEN, API_KEY, KEY_ID, STORAGE]
CALLBACK = """
from lightning import Callback

class Notify(Callback):
    def __init__(self, api_key: str, storage_options: dict, note: str) -> None:
        assert (api_key, storage_options) == ("key10planted", {"key": "key11planted", "secret": "sec12planted"})
        print("the callback has its secrets")
"""
OPTIONS = f"api_key: {API_KEY}, storage_options: {{key: {KEY_ID}, secret: {STORAGE}}}"
CALLBACKS = f"--trainer.callbacks=[{{class_path: notify.Notify, init_args: {{{OPTIONS}, note: NOTE}}}}]"


class Handler(BaseHTTPRequestHandler):
    """Hands out one file of pairs to who knows the password and the token."""

    def log_message(self, *_: object) -> None:
        """Log no requests."""

    def do_GET(self) -> None:
        """Answer with the file, or refuse."""
        given = self.headers.get("Authorization", "")
        right = "Basic " + base64.b64encode(f"ann:{PASSWORD}".encode()).decode()
        found = self.path == f"/?token={TOKEN}&name=pairs.jsonl"
        pairs = "".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in rows(0, 24)).encode()
        content = pairs if found and given == right else b""
        self.send_response(404 if not found else 200 if content else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


@pytest.fixture
def address() -> Iterator[str]:
    """Address with a password and a token; its port is that of a server that wants both."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://ann:{PASSWORD}@127.0.0.1:{server.server_port}/?token={TOKEN}&name=pairs.jsonl"
    server.shutdown()
    server.server_close()


def test_planted_secrets_are_found_nowhere(tmp_path: Path, address: str) -> None:
    lab = Lab(tmp_path / "runs")
    lab.folder.mkdir()
    (lab.folder / "notify.py").write_text(CALLBACK)
    cache = tmp_path / "cache"
    notify = CALLBACKS.replace("NOTE", ENVIRONMENT["HF_TOKEN"])
    words = ["--name=a", "--data=PreferencePairs", "--allow-import=notify", "--data.batch_size=4", notify]
    environment = ENVIRONMENT | {"DPO_CACHE": str(cache), "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}

    def run(*more: str) -> tuple[int, str]:
        process = lab.start("fit", *words, *more, **environment)
        printed, _ = process.communicate(timeout=200)
        return process.returncode, printed

    code, printed = run(f"--data.path={address}", "--trainer.max_steps=1")
    assert code == 0 and "the callback has its secrets" in printed, printed
    config = Run(lab.folder / "a").config_path
    resume = [f"--config={config}", "--ckpt_path=last", "--trainer.max_steps=2", notify]
    seen = address.replace(PASSWORD, "***").replace(TOKEN, "***")
    assert seen in config.read_text()
    for more, expected, message in [
        ([f"--data.path={seen}", *resume], 1, "its password is not stored. Set DPO_PASSWORD to it, or give the"),
        ([*resume, f"--data.path={address}"], 0, "Trained 2 of 2 steps"),
        (["--name=b", f"--data.path={address}", f"--model.policy=http://ann:{PASSWORD}@127.0.0.1"], 1, "***@127.0.0.1"),
    ]:
        code, more_printed = run(*more)
        assert code == expected and message in more_printed, more_printed
        printed += more_printed
    written = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.stem.split(".")[0] != "notify"
    }
    assert any(path.suffix == ".wandb" for path in written) and any(path.suffix == ".arrow" for path in written)
    for secret in SECRETS:
        assert secret not in printed
        assert not [path for path, content in written.items() if secret.encode() in content], secret


def test_an_address_is_opened_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    seen = hide_address("s3://key:p@ss@bucket/x?sig=abc&n=1")
    assert seen == "s3://key:***@bucket/x?sig=***&n=1" == hide_address(seen) == conceal(seen)
    assert reveal_address(seen) == "s3://key:p@ss@bucket/x?sig=abc&n=1"
    assert reveal_address(seen.replace("/x?", "/y?")) == "s3://key:p@ss@bucket/y?sig=abc&n=1"
    other = "http://ann:***@host/x"
    with pytest.raises(ValueError, match="DPO_PASSWORD"):
        reveal_address(other)
    os.environ["DPO_PASSWORD"] = "later"
    assert reveal_address(other) == "http://ann:later@host/x"
    for harmless in ("hf://datasets/a/b@main/c", "s3://bucket/x@y", "a: b@c", "http://host:80/?design=1"):
        assert hide_address(harmless) == harmless == reveal_address(harmless)


def test_options_are_secret_by_their_last_word() -> None:
    assert all(map(is_secret_option, ["api_key", "apikey", "token", "aws_secret_access_key", "password", "x.secret"]))
    assert not any(map(is_secret_option, ["tokenizer", "max_tokens", "monkey", "keys", "path", "max_new_tokens"]))
