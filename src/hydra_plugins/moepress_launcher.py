"""moepress's plugins for Hydra, which looks for them in this namespace package.

moepress --multirun quantization=gptq,qesc allocation.bits=2,2.5,3

Every Hydra app of the environment imports this module: so what it takes is imported when it is used.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class SnakemakeLauncher(Launcher):
    """Runs a sweeper's whole batch as one Snakemake DAG; see `moepress.sweeps`. The settings are explained in
    conf/hydra/launcher/snakemake.yaml."""

    def __init__(self, **settings) -> None:
        self.settings = settings
        self.sweep = None

    def setup(self, *, hydra_context, task_function, config) -> None:
        from moepress.execution import Settings
        from moepress.sweeps import Sweep

        self.sweep = Sweep(Settings(**self.settings))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.sweep.launch([list(overrides) for overrides in job_overrides])


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper. Members are checked by the launcher, one by one, so that a wrong one comes back as its failure."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass
