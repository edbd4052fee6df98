# The plan and the two helpers that every rule uses. The plan is made by the library: no logic here.
from moepress.plan import from_snakemake

PLAN = from_snakemake(config)
RESULTS = PLAN.results
RUN = "python -m moepress.stages.{rule} {input.task} {output} 2>&1 | tee {log}"


wildcard_constraints:
    id=r"[A-Za-z0-9._-]+",


def task(stage):
    """The stage's slice of the configuration: a change of it is another file, so mere rewriting starts nothing."""
    return ancient(f"{RESULTS}/tasks/{stage}/{{id}}.yaml")


def upstream(stage):
    """The folders that a stage reads."""
    return lambda wildcards: [ancient(folder) for folder in PLAN.inputs(f"{stage}/{wildcards.id}")]
