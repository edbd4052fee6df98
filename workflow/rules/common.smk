# The plan that every rule asks for its inputs. It is made by the library: no logic here.
from moepress.plan import all_cores, from_snakemake

PLAN = from_snakemake(config)
RESULTS = PLAN.results
ALL_CORES = all_cores(workflow)
RUN = "python -m moepress.stages {input.task} {output} 2>&1 | tee {log}"

shell.prefix(PLAN.shell_prefix)


wildcard_constraints:
    id=r"[A-Za-z0-9._-]+",
