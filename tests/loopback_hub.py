"""A hub on loopback: the endpoints that huggingface_hub and datasets call, over folders, with faults on demand.

It answers as the real hub does: repository info and trees of a commit, and `resolve` with ETag, commit, size and range
headers. Large files come by a redirect to a second address, error codes in `X-Error-Code`.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

LARGE_BYTES = 4096  # what is larger is stored as a large file: named by its sha256, served after a redirect


@dataclass
class Fault:
    """What goes wrong with requests whose line (`GET /path`) matches `pattern`, for the first `times` of them."""

    pattern: str
    times: int = 1_000_000
    status: int = 0  # answer with this status
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1  # close the connection after so many bytes of the body
    body: bytes | None = None  # send this in place of the file


@dataclass
class Hub:
    """`repositories`: folder by (`model` or `dataset`, id, commit). `requests`: what was asked, as `METHOD /path`."""

    address: str = ""
    repositories: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def fault(self, line: str) -> Fault | None:
        """The fault that a request meets, counted down."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None


def describe(path: Path, name: str) -> dict[str, Any]:
    """A file as the tree lists it."""
    data = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    if len(data) > LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class Handler(BaseHTTPRequestHandler):
    """One request; the hub it belongs to is set on a subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.requests.append(line)
        self.hub.tokens.append(self.headers.get("Authorization", ""))
        self.met = self.hub.fault(line)
        if self.met and self.met.status:
            self.reply(self.met.status, b"{}", self.met.headers)
            return
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if path.startswith("/large/"):
            self.send_file(Path(path.removeprefix("/large")), {})
        elif api:
            self.answer_api(*api.groups())
        elif file:
            self.resolve("dataset" if file[1] else "model", file[2], file[3], file[4])
        else:
            self.reply(404, b"{}")

    def repository(self, kind: str, repo_id: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder, or None after the reply that says what is missing."""
        commit = self.hub.branches.get(revision, revision)
        folder = self.hub.repositories.get((kind, repo_id, commit))
        if folder is not None:
            return commit, folder
        known = any((kind, repo_id) == key[:2] for key in self.hub.repositories)
        # The real hub does not tell strangers whether a repository exists.
        status, code = (404, "RevisionNotFound") if known else (401, "RepoNotFound")
        self.reply(status, b"{}", {"X-Error-Code": code})
        return None

    def answer_api(self, kind: str, repo_id: str, what: str | None, revision: str | None, below: str | None) -> None:
        found = self.repository(kind, repo_id, revision or "main")
        if not found:
            return
        commit, folder = found
        files = [describe(path, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "tree":
            inside = [file for file in files if not below or file["path"].startswith(f"{below}/")]
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries: dict[str, Any] = {}
            for file in inside:
                rest = file["path"].removeprefix(f"{below}/") if below else file["path"]
                top = rest.split("/")[0]
                if recursive or "/" not in rest:
                    entries[file["path"]] = file
                else:
                    place = f"{below}/{top}" if below else top
                    entries[place] = {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
            if below and not inside:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            self.reply(200, json.dumps(list(entries.values())).encode())
        elif what == "paths-info":
            form = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
            wanted = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
            folders = {str(Path(file["path"]).parent) for file in files} - {"."}
            listed = [file for file in files if file["path"] in wanted]
            listed += [{"type": "directory", "path": path, "oid": "0" * 40} for path in wanted if path in folders]
            self.reply(200, json.dumps(listed).encode())
        else:
            siblings = [{"rfilename": file["path"]} for file in files]
            info = {"_id": "0", "id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            self.reply(200, json.dumps(info).encode())

    def resolve(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        found = self.repository(kind, repo_id, revision)
        if not found:
            return
        commit, folder = found
        path = folder / name
        if not path.is_file():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        entry = describe(path, name)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            # Another host, as the real hub's storage is: a client that asks for headers alone does not follow.
            elsewhere = self.hub.address.replace("127.0.0.1", "localhost")
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
            self.reply(302, b"", headers | {"Location": f"{elsewhere}/large{path}"})
        else:
            self.send_file(path, headers)

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes() if self.met is None or self.met.body is None else self.met.body
        status, wanted = 200, self.headers.get("Range", "")
        if wanted:
            self.hub.ranges.append(wanted)
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = (int(first), int(last or len(data) - 1)) if first else (len(data) - int(last), len(data) - 1)
            end = min(end, len(data) - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            status, data = 206, data[start : end + 1]
        self.reply(status, data, {"ETag": '"large"', "Accept-Ranges": "bytes"} | headers)

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.met and self.met.cut_after >= 0 and not self.met.status:
            self.wfile.write(data[: self.met.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub, "body": b"", "met": None}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def write_captions(folder: Path, rows_of_group: int = 10) -> Path:
    """A tiny data set as its hub repository lies: two Parquet files of 50 captioned images, in row groups."""
    features = Features(
        {
            "question_id": Value("string"),
            "image": ImageFeature(decode=False),
            "question": Value("string"),
            "answer": List(Value("string")),
        }
    )
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        rows = []
        for number in range(50):
            image = io.BytesIO()
            noise = np.random.default_rng(50 * part + number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(image, "JPEG")
            rows.append(
                {
                    "question_id": f"{part}{number:02d}.jpg",
                    "image": {"bytes": image.getvalue(), "path": None},
                    "question": "What is this?",
                    "answer": [f"noise {part} {number}", "another caption"],
                }
            )
        path = folder / "data" / f"val-0000{part}-of-00002.parquet"
        Dataset.from_list(rows, features=features).to_parquet(str(path), batch_size=rows_of_group)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: val, path: data/val-*}\n---\n"
    (folder / "README.md").write_text(card)
    return folder
