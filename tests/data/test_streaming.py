"""Shards of a hub data set, read with the hub's own client and file system from a local server."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo.runs.folder import Run
from tests.support.runs import Lab

REVISION = "0123456789abcdef0123456789abcdef01234567"
SET = "org/pairs"


def shard(first: int, n: int) -> bytes:
    """Return a Parquet file with a row group for every ten rows."""
    rows = [
        {"prompt": f"How is {i}?", "chosen": f"It is {i}, very good.", "rejected": "No."}
        for i in range(first, first + n)
    ]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


class Server(ThreadingHTTPServer):
    """A hub with one data set that records its requests."""

    files: dict[str, bytes]
    asked: list[tuple[str, str, str]]


class Handler(BaseHTTPRequestHandler):
    """The requests of the hub's client: the revision, the content of a folder, and parts of files."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log no requests."""

    def _send(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """Answer a request, by GET or POST."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = unquote(self.path.split("?")[0])
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        information = (f"/api/datasets/{SET}", f"/api/datasets/{SET}/revision/{REVISION}")
        if path in information:
            self._send(200, {"id": SET, "sha": REVISION, "siblings": []})
        elif path.startswith(f"/api/datasets/{SET}/tree/{REVISION}"):
            folder = path.removeprefix(f"/api/datasets/{SET}/tree/{REVISION}").strip("/")
            self._send(200, [entry for entry in self._entries() if entry["path"].startswith(folder)])
        elif path == f"/api/datasets/{SET}/paths-info/{REVISION}":
            wanted = parse_qs(body).get("paths") or json.loads(body)["paths"]
            self._send(200, [entry for entry in self._entries() if entry["path"] in wanted])
        elif path.startswith(f"/datasets/{SET}/resolve/{REVISION}/"):
            self._part(self.server.files[path.removeprefix(f"/datasets/{SET}/resolve/{REVISION}/")])
        else:
            self._send(404, {})

    do_POST = do_GET

    def _entries(self) -> list[dict[str, Any]]:
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.server.files.items()
        ]
        return [*files, {"type": "directory", "path": "data", "size": 0, "oid": "1" * 40}]

    def _part(self, data: bytes) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self._send(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}")


@pytest.fixture
def hub() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files = {f"data/train_prefs-{n}.parquet": shard(100 * n, 30) for n in range(2)}
    server.files |= {"data/train_sft-0.parquet": b"other", "README.md": b"# Pairs"}
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_hub_shards_are_read_without_copying(hub: Server, tmp_path: Path) -> None:
    """Byte ranges of one revision are read; only tokens are stored, and are found again without the hub."""
    cache = tmp_path / "cache"
    home = {"HF_HOME": str(tmp_path / "home"), "DPO_CACHE": str(cache)}
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    words = ["--data=PreferencePairs", f"--data.path={SET}/data/*_prefs-*.parquet", "--name=a"]

    process = Lab(tmp_path).start("fit", *words, "--trainer.max_steps=2", **home, **here)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    counts = json.loads(Run(tmp_path / "a").audit_path.read_text())["train"]
    assert counts["total"]["read"] == counts["total"]["kept"] == 2 * 30
    read = [(path, part) for _, path, part in hub.asked if "/resolve/" in path]
    shards = {f"/datasets/{SET}/resolve/{REVISION}/data/train_prefs-{n}.parquet" for n in range(2)}
    assert {path for path, _ in read} == shards
    assert all(part.startswith("bytes=") for _, part in read)
    assert {file.relative_to(cache).parts[0].split("-")[0] for file in cache.rglob("*")} == {"tokens", "listings"}
    assert not list((tmp_path / "home").rglob("*.parquet"))

    hub.shutdown()
    process = Lab(tmp_path).start("validate", *words, "--ckpt_path=last", **home, HF_HUB_OFFLINE="1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
