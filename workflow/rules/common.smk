# The plan that every rule asks for its inputs. It is made by the library: no logic here.
# The rules' `conda:` are there for `snakemake --lint`, which wants an environment named: jobs run in the one that Snakemake runs in.
from moepress import buckets, patches
from moepress.locks import inside_snakemake
from moepress.plan import all_cores, from_snakemake

inside_snakemake()
patches.apply()
PLAN = from_snakemake(config)
RESULTS = PLAN.results
buckets.apply(workflow, RESULTS)
ALL_CORES = all_cores(workflow)
RUN = "python -m moepress.stages {params.task:q} {output:q} 2>&1 | tee {log:q}"

shell.prefix(PLAN.shell_prefix)


wildcard_constraints:
    id=r"[A-Za-z0-9._-]+",
