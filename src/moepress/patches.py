"""Changes to the Snakemake (9.27) that reads our Snakefile."""

import threading
from pathlib import Path

from snakemake.jobs import Job
from snakemake.scheduling.job_scheduler import JobScheduler

from moepress import integrity

_remove_existing_output = Job.remove_existing_output


async def _remove_what_is_not_whole(job: Job) -> None:
    if not any(integrity.is_whole(Path(path)) for path in job.output):
        await _remove_existing_output(job)


def _wake_once(scheduler: JobScheduler, delay: float) -> None:
    def wake():
        scheduler._is_to_wake = False  # before the scheduler looks, and asks to be woken again
        scheduler._open_jobs.release()

    if not vars(scheduler).get("_is_to_wake"):
        scheduler._is_to_wake = True
        threading.Timer(delay, wake).start()


def apply() -> None:
    """Two things.

    - A job starts without removing its output where that is a whole artefact: another run, of a checkout with the same
      results, has finished it since this run's DAG was made. The stage then has nothing to do.
    - One timer at a time wakes the scheduler. Snakemake starts one at each waking and one more for every job that ends, and
      none of these chains ever stops: after some hundred jobs it keeps a core busy with looking whether there is anything to do
      (https://github.com/snakemake/snakemake/issues/2354).
    """
    Job.remove_existing_output = _remove_what_is_not_whole
    JobScheduler._schedule_reevalutation = _wake_once
