"""A Slurm of this machine alone: munge, a controller and two node daemons on loopback, all in one folder, and gone afterwards.

python tests/cluster/slurm.py FOLDER        starts it, says how to use it, and takes it down at Ctrl-C or `kill`

Needs Debian's slurmctld, slurmd, slurm-client and munge (apt-get install slurm-wlm munge). No cgroups, no accounting daemon:
what ran where is in the controller's own text file. A node's "GPU" is /dev/null: it is counted and handed out as a real one is.
"""

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("node1", "node2")
MEMORY_MB = 8000

SLURM_CONF = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=30
CryptoType=crypto/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=5,batch_sched_delay=0
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={place}/jobs.txt
ReturnToService=2
MinJobAge=3600
SlurmdTimeout={timeout}
MessageTimeout=60
KillWait=5
LaunchParameters=enable_nss_slurm
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """What this machine lacks for it, or None."""
    absent = [name for name in PROGRAMS if not program(name)]
    return f"no {', '.join(absent)} here (Debian: slurm-wlm, munge)" if absent else None


def program(name: str) -> str | None:
    """Daemons are where only root looks."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


class Cluster:
    """Two nodes with `cpus` each, as a context: `with Cluster(folder) as cluster: subprocess.run([...], env=cluster.env)`.

    timeout: seconds of silence after which the controller gives a node up.
    """

    def __init__(self, place: Path, cpus: int = 1, timeout: int = 10):
        self.place, self.cpus, self.timeout = place.absolute(), cpus, timeout
        self.daemons: dict[str, subprocess.Popen] = {}

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands talk to it. Snakemake's executor drops SLURM_CONF inside a job, where a
        cluster has it in /etc: the srun that it finds first sets it again."""
        path = f"{self.place}/bin:{os.environ['PATH']}"
        return {**os.environ, "SLURM_CONF": str(self.place / "slurm.conf"), "PATH": path}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        controller, *ports = free_ports(1 + len(NODES))
        each = f"CPUs={self.cpus} RealMemory={MEMORY_MB} Gres=gpu:1 State=UNKNOWN"
        lines = [
            f"NodeName={n} NodeAddr=127.0.0.1 NodeHostname=localhost Port={p} {each}" for n, p in zip(NODES, ports, strict=True)
        ]
        for folder in ("bin", "munge", "state", *NODES):
            (self.place / folder).mkdir(parents=True, mode=0o755)
        values = {"place": self.place, "user": getpass.getuser(), "controller": controller, "timeout": self.timeout}
        (self.place / "slurm.conf").write_text(SLURM_CONF.format(nodes="\n".join(lines), **values))
        (self.place / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self.place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        srun = self.place / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={shlex.quote(str(self.place))}/slurm.conf exec {program("srun")} "$@"\n')
        srun.chmod(0o755)
        key = self.place / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [
            f"--{name}={self.place}/munge/{name.removesuffix('-file')}"
            for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ]
        self.daemon("munged", "--foreground", "--force", *munge)
        self.wait_for(lambda: (self.place / "munge" / "socket").exists(), "munged's socket")
        self.daemon("slurmctld", "-D", "-f", str(self.place / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.states() == dict.fromkeys(NODES, "idle"), "idle nodes")

    def daemon(self, name: str, *arguments: str, called: str | None = None) -> None:
        with (self.place / f"{called or name}.out").open("ab") as out:
            self.daemons[called or name] = subprocess.Popen(
                [program(name), *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        self.daemon("slurmd", "-D", "-N", node, "-f", str(self.place / "slurm.conf"), called=node)

    def kill_node(self, node: str) -> None:
        """As if its power had gone: the daemon and all that it runs, SIGKILL, at once."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        for process in self.of_node(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait(30)

    def of_node(self, node: str) -> list[psutil.Process]:
        """The processes of a node's jobs: first the steps' own daemons, which would tell of the others' end, then all that has
        the node in its environment."""
        steps, found = {}, []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error):
                values = process.environ()
                if values.get("SLURMD_NODENAME") == node and str(self.place) in values.get("PATH", ""):
                    found.append(process)
                    if (parent := process.parent()) and parent.name().startswith("slurmstepd"):
                        steps[parent.pid] = parent
        return [*steps.values(), *found]

    def states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down ..."""
        text = self.ask("sinfo", "--noheader", "--Node", "--format=%N %T")
        return dict(line.split() for line in text.splitlines())

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says; nothing where it gets no answer."""
        try:
            return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=20).stdout
        except subprocess.TimeoutExpired:
            return ""

    def running(self) -> list[str]:
        """Of every running job: its number, its node, and what Snakemake says of it: the rule and its wildcards."""
        return self.ask("squeue", "--noheader", "--states=RUNNING", "--format=%i %N %k").splitlines()

    def jobs(self) -> list[dict[str, str]]:
        """Every job as the controller knows it: JobState, NodeList, Restarts, Comment, TresPerJob ..."""
        return [fields(line) for line in self.ask("scontrol", "show", "jobs", "--oneliner").splitlines()]

    def endings(self) -> list[dict[str, str]]:
        """The controller's line each time that a job ended, also where it was queued again: JobId, JobState, NodeList ..."""
        path = self.place / "jobs.txt"
        return [fields(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition, what: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join((self.place / f"{name}.out").read_text()[-1500:] for name in ended)
                raise RuntimeError(f"{what}: not there{'; ended: ' + ', '.join(ended) if ended else ''}\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Everything down, jobs included, whatever state it is in; the folder stays for whoever reads logs."""
        for node in NODES:
            for process in self.of_node(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for daemon in reversed(self.daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()


if __name__ == "__main__":
    if lack := missing():
        sys.exit(lack)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Cluster(Path(sys.argv[1])) as running:
        print(
            f"export SLURM_CONF={running.place}/slurm.conf   # then: sinfo, sbatch ...; Ctrl-C here takes it down", flush=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
