"""As much of Kubernetes as Snakemake's executor asks of it, on loopback: what a pod would run is run here, in an empty folder.

Secrets, jobs and their status; no images, volumes or scheduling. A pod's environment is its secret's, and a PATH on which
`python` is this one, as in an image with moepress and its plugins; `pip`, which the executor lets install them in every pod,
does nothing.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONFIG = """
apiVersion: v1
kind: Config
current-context: here
clusters: [{{name: here, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
contexts: [{{name: here, context: {{cluster: here, user: me}}}}]
users: [{{name: me, user: {{}}}}]
"""


class Pods:
    """A context: `with Pods(folder, image) as pods: subprocess.run([...], env={**os.environ, **pods.env})`.

    image: environment variables that every pod has. bodies: what was sent of each job.
    """

    def __init__(self, place: Path, image: dict[str, str]):
        self.place, self.image = place, image
        self.secrets: dict[str, dict[str, str]] = {}
        self.bodies: dict[str, dict] = {}
        self.running: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Pods":
        (self.place / "bin").mkdir(parents=True)
        (self.place / "bin" / "pip").write_text("#!/bin/sh\n")
        (self.place / "bin" / "pip").chmod(0o755)
        (self.place / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.place / "bin" / "python").chmod(0o755)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"pods": self}))
        (self.place / "config").write_text(CONFIG.format(port=self.server.server_port))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def env(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self.place / "config")}

    def start(self, body: dict) -> None:
        name = body["metadata"]["name"]
        (container,) = body["spec"]["template"]["spec"]["containers"]
        env = {"PATH": f"{self.place}/bin:/usr/bin:/bin", **self.image}
        for each in container["env"]:
            wanted = each["valueFrom"]["secretKeyRef"]
            env[each["name"]] = base64.b64decode(self.secrets[wanted["name"]][wanted["key"]]).decode()
        work = self.place / name
        work.mkdir()
        env["HOME"] = str(work)
        with (self.place / f"{name}.log").open("wb") as log:
            command = [*container["command"], *container["args"]]
            own = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self.running[name] = subprocess.Popen(command, cwd=work, env=env, **own)
        self.bodies[name] = body

    def status(self, name: str) -> dict:
        code = self.running[name].poll()
        return {} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}


class Handler(BaseHTTPRequestHandler):
    pods: Pods

    def answer(self, body: dict, code: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def read(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")

    def do_POST(self) -> None:
        body, kind = self.read(), self.path.rpartition("/")[2]
        if kind == "secrets":
            self.pods.secrets[body["metadata"]["name"]] = body["data"]
        elif kind == "jobs":
            resources = body["spec"]["template"]["spec"]["containers"][0]["resources"]
            if "nvidia.com/gpu" in resources["requests"] and "nvidia.com/gpu" not in resources.get("limits", {}):
                self.answer({"message": "Limit must be set for non overcommitable resources"}, 422)
                return
            self.pods.start(body)
        else:
            self.answer({"message": f"no {kind} here"}, 404)
            return
        self.answer(body, 201)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/")
        if parts[-1] == "pods":
            self.answer({"items": []})
        else:
            name = parts[parts.index("jobs") + 1]
            self.answer({"metadata": {"name": name}, "status": self.pods.status(name)})

    def do_DELETE(self) -> None:
        self.read()
        self.answer({"status": "Success"})

    def log_message(self, *_) -> None:
        pass
