"""A stand-in for the Hugging Face Hub: model repositories in memory, every commit on top of the last one."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []  # their messages


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, status: int, body: bytes, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value, status: int = 200, **headers):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = "/".join(filter(None, [request.get("organization") or "me", request["name"]]))
            hub.repositories.setdefault(repo_id, {})
            hub.private[repo_id] = request.get("visibility") == "private" or bool(request.get("private"))
            return self._send_json({"url": f"{hub.endpoint}/{repo_id}", "id": repo_id, "name": repo_id})
        if path == "/api/validate-yaml":
            return self._send_json({"warnings": [], "errors": []})
        repo_id, _, action = path.removeprefix("/api/models/").removesuffix("/main").rpartition("/")
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._send_json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value["summary"])
            elif line["key"] == "file":
                hub.repositories[repo_id][value["path"]] = base64.b64decode(value["content"])
        commit = self._commit(repo_id)
        url = f"{hub.endpoint}/{repo_id}/commit/{commit}"
        self._send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _commit(self, repo_id: str) -> str:
        contents = self.server.repositories[repo_id]
        return hashlib.sha1(b"".join(name.encode() + contents[name] for name in sorted(contents))).hexdigest()

    def do_GET(self):
        path = self.path.split("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        if repo_id not in self.server.repositories:
            return self._send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        contents, commit = self.server.repositories[repo_id], self._commit(repo_id)
        if rest and rest[0] == "resolve":
            content = contents.get("/".join(rest[2:]))
            if content is None:
                return self._send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return self._send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        if rest and rest[0] == "tree":
            return self._send_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in contents.items()
                ]
            )
        siblings = [{"rfilename": name} for name in contents]
        self._send_json({"id": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    do_HEAD = do_GET
