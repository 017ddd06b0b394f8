# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A Hugging Face hub of one repository on a local port, and what was asked of it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """`files` by name under `repo`; `token` makes it gated for everybody else."""

    def __init__(self, repo: str, folder: Path, token: str | None = None) -> None:
        self.repo = repo
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.token = token
        self.asked: list[str] = []
        self.url = ""

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one GET."""
        parts = urlsplit(path).path.strip("/").split("/")
        self.asked.append("/".join(parts))
        if "/".join(parts[2:4]) != self.repo and "/".join(parts[:2]) != self.repo:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if self.token and authorization != f"Bearer {self.token}":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if parts[0] == "api" and parts[4] == "revision":
            if parts[5] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            names = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": self.repo, "sha": COMMIT, "siblings": names}).encode()
        if parts[0] == "api" and parts[4] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        data = self.files.get(parts[-1])
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}, data


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serves `hub` at `hub.url` for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
