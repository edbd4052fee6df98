"""An S3 server of this machine alone: moto's, on loopback, in memory, and gone afterwards.

python tests/cluster/s3.py        starts it, says how to use it, and ends at Ctrl-C
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

from slurm import free_ports


class Server:
    """With an empty bucket `moepress`, as a context: `with Server() as server: subprocess.run([...], env=server.env)`."""

    def __enter__(self) -> "Server":
        import boto3
        from botocore.exceptions import BotoCoreError

        (port,) = free_ports(1)
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        own = {"endpoint_url": self.url, "region_name": "us-east-1"}
        s3 = boto3.resource("s3", aws_access_key_id="any", aws_secret_access_key="any", **own)
        self.bucket = s3.Bucket("moepress")
        deadline = time.monotonic() + 60
        while True:
            try:
                self.bucket.create()
                return self
            except BotoCoreError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.__exit__()
                    raise
                time.sleep(0.2)

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def env(self) -> dict[str, str]:
        """What Snakemake's plugin reads."""
        prefix = "SNAKEMAKE_STORAGE_S3_"
        own = {f"{prefix}ENDPOINT_URL": self.url, f"{prefix}ACCESS_KEY": "any", f"{prefix}SECRET_KEY": "any"}
        return {**os.environ, **own}

    def keys(self, prefix: str = "") -> dict[str, int]:
        """Of all objects below it, with their sizes."""
        return {item.key: item.size for item in self.bucket.objects.filter(Prefix=prefix)}


if __name__ == "__main__":
    with Server() as running:
        for name, value in running.env.items():
            if name.startswith("SNAKEMAKE_STORAGE_S3_"):
                print(f"export {name}={value}", flush=True)
        print("# then: moepress ... hydra.launcher.storage=s3://moepress/results; Ctrl-C here ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
