"""As much of a W&B server as a mirror talks to: runs, their files and streams, artifacts by digest. For tests."""

import gzip
import json
import re
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """`with Server() as server`: answers at server.url, and keeps what it was sent.

    runs: id -> what it was told of the run. streams: run -> file -> line number -> line, as W&B stores them: a line sent
    again takes its own place. views: name -> workspace. artifacts: (collection, digest) -> {id, state, maker, users}.
    """

    def __init__(self):
        self.runs, self.artifacts, self.asked = {}, {}, Counter()
        self.streams = defaultdict(lambda: defaultdict(dict))
        self.files = defaultdict(set)
        self.views = {}
        self.unknown = []
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # W&B drops its connections when it is done
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def history(self, run):
        lines = self.streams[run]["wandb-history.jsonl"]
        return [json.loads(lines[number]) for number in sorted(lines)]

    def graphql(self, query, given):
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        given = given or {}
        told = given.get("input", given)
        self.asked[name] += 1
        answer = getattr(self, f"on_{name}", None)
        if answer is None:
            self.unknown.append((name, told, query))
            return {}
        return answer(told)

    def on_Viewer(self, _):
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def on_ServerFeaturesQuery(self, _):
        return {"serverInfo": {"features": []}}

    def project(self):
        return {"id": "p", "name": "a-project", "entity": {"id": "e", "name": "me"}}

    def on_UpsertBucket(self, told):
        inserted = told["name"] not in self.runs
        self.runs.setdefault(told["name"], {}).update({name: value for name, value in told.items() if value is not None})
        bucket = {"id": told["name"], "name": told["name"], "displayName": told["displayName"], "description": None}
        lines = len(self.streams[told["name"]]["wandb-history.jsonl"])
        bucket |= {"config": told["config"], "sweepName": None, "project": self.project(), "historyLineCount": lines}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_RunResumeStatus(self, told):
        run = told["name"]
        if run not in self.runs:
            return {"model": {**self.project(), "bucket": None}}
        history = self.history(run)
        summary = self.streams[run]["wandb-summary.json"].get(0, "{}")
        bucket = {"id": run, "name": run, "summaryMetrics": summary, "displayName": self.runs[run]["displayName"]}
        bucket |= {"logLineCount": 0, "historyLineCount": len(history), "eventsLineCount": 0, "eventsTail": "[]"}
        bucket |= {"historyTail": json.dumps([json.dumps(row) for row in history[-1:]]), "config": self.runs[run]["config"]}
        bucket |= {"wandbConfig": json.dumps({"t": 1}), "tags": []}
        return {"model": {**self.project(), "bucket": bucket}}

    def on_GetDefaultEntity(self, _):
        return {"viewer": {"id": "u", "entity": "me"}}

    def on_UpsertView2(self, told):
        inserted = told["name"] not in self.views
        self.views[told["name"]] = {"id": f"v-{told['name']}", "displayName": told["displayName"], "spec": told["spec"]}
        return {"upsertView": {"view": {"id": f"v-{told['name']}", "name": told["name"]}, "inserted": inserted}}

    def on_View(self, told):
        found = [{"node": view} for name, view in self.views.items() if name == told["viewName"]]
        return {"project": {"allViews": {"edges": found}}}

    def on_ArtifactType(self, _):
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, told):
        key = told["artifactCollectionName"], told["digest"]
        found = self.artifacts.setdefault(
            key, {"id": f"a{len(self.artifacts)}", "state": "PENDING", "maker": told["runName"], "users": set(), "told": told}
        )
        artifact = {"id": found["id"], "state": found["state"], "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def by_id(self, id):
        return next(found for found in self.artifacts.values() if found["id"] == id)

    def on_CreateArtifactManifest(self, told):
        file = {"id": "f", "displayName": "manifest", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        manifest = {"id": f"m-{told.get('artifactId', told.get('artifactID'))}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def on_UpdateArtifactManifest(self, told):
        file = {"id": "f", "displayName": "manifest", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def on_CommitArtifact(self, told):
        found = self.by_id(told["artifactID"])
        found["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": found["id"], "digest": "d"}}}

    def on_UseArtifact(self, told):
        self.by_id(told["artifactID"])["users"].add(told["runName"])
        return {"useArtifact": {"artifact": {"id": told["artifactID"], "digest": "", "description": None}}}

    def on_CreateArtifactFiles(self, told):
        specifications = told.get("artifactFiles", told.get("files", []))
        nodes = [
            {"id": "f", "name": file["name"], "displayName": file["name"], "uploadUrl": f"{self.url}/upload",
             "uploadHeaders": [], "uploadMultipartUrls": None, "storagePath": file["name"],
             "artifact": {"id": file["artifactID"]}}
            for file in specifications
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CreateRunFiles(self, told):
        self.files[told["run"]] |= set(told["files"])
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in told["files"]]
        return {"createRunFiles": {"runID": told["run"], "uploadHeaders": [], "files": files}}

    def stream(self, run, body):
        for name, chunk in (body.get("files") or {}).items():
            for number, line in enumerate(chunk["content"]):
                self.streams[run][name][chunk["offset"] + number] = line
        if body.get("complete"):
            self.runs.setdefault(run, {})["exitcode"] = body.get("exitcode")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        out: dict = {}
        with self.server_of.lock:
            if self.path.startswith("/graphql"):
                asked = json.loads(body)
                out = {"data": self.server_of.graphql(asked["query"], asked.get("variables"))}
            elif self.path.endswith("/file_stream"):
                self.server_of.stream(self.path.split("/")[-2], json.loads(body))
        data = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer
