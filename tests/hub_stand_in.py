"""A stand-in for the Hugging Face Hub on this machine: as much of its HTTP interface as an upload needs."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded.

    Attributes:
        files: Contents by repository, branch and name.
        created: The bodies of the requests that made repositories.
        refuse: A status with which every request is refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.refuse: int | None = None


class Handler(BaseHTTPRequestHandler):
    """https://huggingface.co/docs/hub/api: repos/create, branch, validate-yaml, preupload, commit."""

    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse is not None:
            return self._answer(self.server.refuse, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            repo = f"{request['organization'] or 'me'}/{request['name']}"
            return self._answer(200, {"url": f"{self.server.address}/{repo}", "id": repo})
        if self.path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(branch|preupload|commit)/([\w.-]+)", self.path)
        if found is None:
            return self._answer(404, {"error": f"the stand-in has no {self.path}"})
        repo, action, branch = found.groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        files = self.server.files.setdefault((repo, branch), {})
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = base64.b64decode(value["content"])
        return self._answer(
            200, {"commitUrl": f"{self.server.address}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
        )

    def _validate(self, card: str) -> None:
        """As the Hub: base_model must be the name of a model there."""
        header = yaml.safe_load(card.split("---\n")[1])
        base = header.get("base_model")
        wrong = base is not None and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base)
        message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        errors = [{"message": message}] if wrong else []
        self._answer(400 if wrong else 200, {"errors": errors, "warnings": []})

    def _answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
