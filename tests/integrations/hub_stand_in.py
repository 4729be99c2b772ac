"""A stand-in of the hub's HTTP interface: what huggingface_hub asks when it creates a repository and a commit.

Large files (by the same rule as a .gitattributes of the hub: *.safetensors and *.npy) go through git LFS, others are
in the commit. What arrives is kept in `files`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class StandIn:
    def __init__(self, token: str, refuse: bool = False) -> None:
        self.token, self.refuse = token, refuse
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.summary = ""
        self.asked: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None: ...

            def answer(self, value: Any, code: int = 200) -> None:
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_PUT(self) -> None:
                content = self.body()
                stand_in.objects[hashlib.sha256(content).hexdigest()] = content
                self.answer({})

            def do_POST(self) -> None:
                content, path = self.body(), self.path.split("?")[0]
                stand_in.asked.append(path)
                if stand_in.refuse or self.headers.get("Authorization") != f"Bearer {stand_in.token}":
                    self.answer({"error": "Invalid credentials"}, 401)
                elif path == "/api/repos/create":
                    self.answer(stand_in.create(json.loads(content)))
                elif path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    files = json.loads(content)["files"]
                    modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
                    self.answer({"files": modes})
                elif path.endswith("/info/lfs/objects/batch"):
                    self.answer(stand_in.batch(json.loads(content)))
                elif "/commit/" in path:
                    stand_in.commit([json.loads(line) for line in content.splitlines() if line])
                    url = f"{stand_in.url}/{path.split('/')[3]}/{path.split('/')[4]}/commit/" + "0" * 40
                    self.answer({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": "", "success": True})
                else:
                    self.answer({"error": f"no {path}"}, 404)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        self.repositories[name] = asked
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}"}}} for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.summary = value["summary"]
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]


def mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".npy")) else "regular"
