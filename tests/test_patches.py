"""What our Snakefile changes in Snakemake, in a real one."""

import os
import subprocess
import sys

import pytest

SNAKEFILE = """
import threading
from snakemake.scheduling.job_scheduler import JobScheduler
{apply}
reevaluate = JobScheduler._schedule_reevalutation
def counting(scheduler, delay):
    reevaluate(scheduler, delay)
    print("timers", sum(isinstance(thread, threading.Timer) for thread in threading.enumerate()), flush=True)
JobScheduler._schedule_reevalutation = counting

rule all:
    input: "last", expand("short-{{i}}", i=range(8))
rule short:
    output: "short-{{i}}"
    shell: "touch {{output}}"
rule last:
    output: "last"
    shell: "sleep 4; touch {{output}}"
"""


@pytest.mark.parametrize(("apply", "most"), [("from moepress import patches; patches.apply()", 2), ("", None)])
def test_one_timer_wakes_the_scheduler(tmp_path, apply, most):
    """However many jobs have ended (a second one may be about to end); without the patch more: if that fails, Snakemake has
    mended it, and ours can go."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE.format(apply=apply))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "all"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "last").exists(), done.stderr
    timers = max(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("timers "))
    assert timers <= most if most else timers > 3
