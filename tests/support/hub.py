"""A local server that speaks the part of the Hugging Face hub's HTTP API that is used here.

It keeps repositories of models and data sets in all their revisions, and checks what it receives as the hub does: the
token, hashes and sizes of objects, and that objects are there before the commit that names them. Large files are
objects, as by git-LFS; with `hf_xet` they would come from a storage service with its own protocol, which
`huggingface_hub` handles. It can also answer like a hub on a bad day: late, or with half a file.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import HfFileSystem, close_session, constants, hf_api

TOKEN = "hf_" + "Aa1" * 12
LFS_FROM = 1_000  # bytes; the hub decides by file type and size which files are stored as objects
PAGE_SIZE = 4  # entries of one answer to a listing; the hub has 1,000

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: the files of its newest revision, and those of every revision by its hash.

    Attributes:
        access: Whose requests for its files are answered: those of ``all``, of whoever has ``accepted`` its conditions,
            which the owner of `TOKEN` has, or of whoever was ``admitted``, which nobody was.
    """

    private: bool = False
    files: Files = field(default_factory=dict)
    revisions: dict[str, Files] = field(default_factory=dict)
    access: str = "all"
    commits: int = 0

    def commit(self, files: Mapping[str, bytes]) -> str:
        """Add files in a new revision and return its hash."""
        self.files = {**self.files, **files}
        self.commits += 1
        sha = hashlib.sha1(repr((self.commits, sorted(self.files.items()))).encode()).hexdigest()
        self.revisions[sha] = self.files
        return sha

    def find_revision(self, name: str) -> str | None:
        """Return the hash of a revision, given by its hash or as the branch main."""
        newest = next(reversed(self.revisions), "0" * 40)
        return newest if name == "main" else name if name in self.revisions else None


@dataclass
class Hub:
    """State of the server.

    Attributes:
        url: Its address.
        store_url: Address of the objects, which the hub has on another host.
        repositories: Repositories by name; those of data sets begin with ``datasets/``.
        objects: Contents of large files by their SHA-256.
        requests: Method and path of every request so far.
        ranges: The ranges of objects that were asked for.
        cuts: How many of the next downloads of objects end in the middle.
        delay: Seconds after which it answers.
    """

    url: str
    store_url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    refuse_uploads: bool = False
    cuts: int = 0
    delay: float = 0.0

    def publish(self, name: str, folder: Path, **options: Any) -> str:
        """Add the files of a folder to a repository, which is made if it is not there; return the revision."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values() if is_object(data)}
        return self.repositories.setdefault(name, Repository(**options)).commit(files)


def is_object(data: bytes) -> bool:
    """Return whether a file is stored as an object."""
    return len(data) >= LFS_FROM


def entry_of(path: str, data: bytes) -> dict[str, Any]:
    """Describe a file as the hub's listings do."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if is_object(data):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def entries_below(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """List a folder: its files and folders, with `recursive` also those in its folders."""
    prefix = f"{folder}/" if folder else ""
    below = {path: data for path, data in files.items() if path.startswith(prefix)}
    parents = {str(parent) for path in below for parent in Path(path).parents if str(parent).startswith(prefix)} - {"."}
    folders = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(parents)]
    listed = [*folders, *(entry_of(path, data) for path, data in sorted(below.items()))]
    return [each for each in listed if recursive or "/" not in str(each["path"]).removeprefix(prefix)]


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status: int, content: object = None, **headers: str) -> None:
        self._send(status, json.dumps(content if content is not None else {}).encode(), **headers)

    def _send(self, status: int, data: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _handle(self) -> None:
        body, address = self._body(), urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(f"{self.command} {path}")
        Event().wait(self.hub.delay)  # tests may replace time.sleep
        # The URL of an object is signed and needs no token.
        if path.startswith("/objects/"):
            return self._object(path.removeprefix("/objects/"), body)
        reads = self.command in ("GET", "HEAD") or "/paths-info/" in path
        if not reads and not self._is_known:
            return self._reply(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.count("/") < 3:
            return self._refuse(404, "", f"Nothing at {path}")
        return self._in_repository(path, parse_qs(address.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _in_repository(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        path = path.removeprefix("/api").removeprefix("/models").replace(".git/", "/")
        kind = "datasets/" if path.startswith("/datasets/") else ""
        _, user, name, *action = path.removeprefix("/datasets").split("/")
        full_name = f"{kind}{user}/{name}"
        repository = self.hub.repositories.get(full_name)
        if repository is None or (repository.private and not self._is_known):
            status = 404 if self._is_known else 401  # it does not tell strangers what there is
            return self._refuse(status, "RepoNotFound", "Repository not found")
        match action:
            case ["preupload", "main"]:
                self._preupload(json.loads(body), repository)
            case ["info", "lfs", "objects", "batch"]:
                self._batch(json.loads(body))
            case ["commit", "main"]:
                lines = [json.loads(line) for line in body.splitlines()]
                self._commit(lines, repository, f"{self.hub.url}/{full_name}")
            case [] | ["revision" | "tree" | "paths-info" | "resolve", *_]:
                self._read(repository, f"{user}/{name}", action or ["revision", "main"], query, body)
            case _:
                self._refuse(404, "", f"Nothing at {path}")
        return None

    def _read(
        self, repository: Repository, name: str, action: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        verb, revision, *rest = action
        sha = repository.find_revision(revision)
        if sha is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, path = repository.revisions.get(sha, {}), "/".join(rest)
        if verb == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            gated = False if repository.access == "all" else "manual"
            info = {"id": name, "sha": sha, "private": repository.private, "gated": gated, "siblings": siblings}
            return self._reply(200, info | {"tags": [], "downloads": 0, "likes": 0})
        if verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return self._reply(200, [each for each in entries_below(files, "", True) if each["path"] in wanted])
        if verb == "tree":
            return self._list(
                entries_below(files, path, query.get("recursive", [""])[0].lower() == "true"), path, query
            )
        return self._resolve(repository, sha, path)

    def _list(self, entries: list[dict[str, Any]], path: str, query: dict[str, list[str]]) -> None:
        if path and not entries:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        start = int(query.get("cursor", ["0"])[0])
        address = f"{self.hub.url}{urlsplit(self.path).path}?recursive={query.get('recursive', ['False'])[0]}"
        more = start + PAGE_SIZE < len(entries)
        link = {"Link": f'<{address}&cursor={start + PAGE_SIZE}>; rel="next"'} if more else {}
        return self._reply(200, entries[start : start + PAGE_SIZE], **link)

    def _resolve(self, repository: Repository, sha: str, path: str) -> None:
        if repository.access != "all" and not (repository.access == "accepted" and self._is_known):
            status = 403 if self._is_known else 401
            return self._refuse(status, "GatedRepo", "Access to this repository is restricted")
        files = repository.revisions.get(sha, {})
        if path not in files:
            message = f"Entry not found: {path}"
            return self._reply(404, {}, X_Error_Code="EntryNotFound", X_Error_Message=message, X_Repo_Commit=sha)
        data, entry = files[path], entry_of(path, files[path])
        common = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if "lfs" not in entry:
            return self._send(200, data, ETag=f'"{entry["oid"]}"', **common)
        oid = entry["lfs"]["oid"]
        place = {"Location": f"{self.hub.store_url}/objects/{oid}", "X_Linked_Size": str(len(data))}
        return self._send(302, b"", X_Linked_ETag=f'"{oid}"', **place, **common)

    def _object(self, oid: str, body: bytes) -> None:
        if self.command in ("GET", "HEAD"):
            return self._send_object(self.hub.objects[oid])
        if self.hub.refuse_uploads or hashlib.sha256(body).hexdigest() != oid:
            return self._reply(403, {"error": "Refused"})
        self.hub.objects[oid] = body
        return self._reply(200)

    def _send_object(self, data: bytes) -> None:
        cut = self.command == "GET" and self.hub.cuts > 0
        self.hub.cuts -= cut
        wanted = self.headers.get("Range", "")
        if not wanted:
            return self._send(200, data, cut)
        self.hub.ranges.append(wanted)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        content_range = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self._send(206, part, cut, Content_Range=content_range)

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository(private=request.get("visibility") == "private")
        self._reply(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, request: dict[str, Any], repository: Repository) -> None:
        files = []
        for file in request["files"]:
            large, known = file["size"] >= LFS_FROM, repository.files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if known is not None:
                described = entry_of(file["path"], known)
                entry["oid"] = described["lfs"]["oid"] if large else described["oid"]
            files.append(entry)
        self._reply(200, {"files": files})

    def _batch(self, request: dict[str, Any]) -> None:
        assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
        objects = []
        for entry in request["objects"]:
            if entry["oid"] in self.hub.objects:
                objects.append(entry)
            else:
                upload = {"href": f"{self.hub.url}/objects/{entry['oid']}"}
                objects.append(entry | {"actions": {"upload": upload}})
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _commit(self, lines: list[dict[str, Any]], repository: Repository, url: str) -> None:
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        new = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                new[value["path"]] = base64.b64decode(value["content"], validate=True)
            else:
                assert line["key"] == "lfsFile" and value["algo"] == "sha256"
                new[value["path"]] = self.hub.objects[value["oid"]]
                assert len(new[value["path"]]) == value["size"]
        sha = repository.commit(new)
        self._reply(200, {"commitUrl": f"{url}/commit/{repository.commits}", "commitOid": sha})


class Server(ThreadingHTTPServer):
    """A server that does not mind clients who went away."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@cache
def _port() -> int:
    """Return the port of the server, which is the same for all tests: clients that they share keep its address."""
    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Begin a hub without repositories, and let everything in this process take it for the one at huggingface.co."""
    url, store_url = (f"http://{host}:{_port()}" for host in ("127.0.0.1", "localhost"))
    state = Handler.hub = Hub(url, store_url)
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": state.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": state.url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    close_session()  # an earlier test may have left a client with other settings
    HfFileSystem.clear_instance_cache()
    try:
        with (
            patch.dict("os.environ", NO_PROXY="127.0.0.1,localhost"),
            patch.multiple(constants, **settings),
            patch.object(hf_api.api, "endpoint", state.url),
        ):
            yield state
    finally:
        close_session()
        HfFileSystem.clear_instance_cache()
