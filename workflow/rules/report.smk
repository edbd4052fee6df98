# One report over all experiments that were asked for, and its mirror at W&B.
rule report:
    input:
        PLAN.upstream("report"),
    output:
        report(
            directory(f"{RESULTS}/report/{{id}}"),
            patterns=["{name}.html", "figures/{name}.svg", "{name,runs|costs}.csv"],
            caption="../report/report.rst",
            category="Results",
        ),
    log:
        f"{RESULTS}/logs/report/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("report"),
    params:
        task=PLAN.task("report"),
    shell:
        RUN


rule tracking:
    input:
        report=f"{RESULTS}/report/{{id}}",
    output:
        f"{RESULTS}/tracking/{{mode}}/{{id}}.json",
    log:
        f"{RESULTS}/logs/tracking/{{mode}}-{{id}}.log",
    conda:
        "../../environment.yml"
    params:
        settings=PLAN.tracking,
    shell:
        "python -m moepress.tracking {input.report:q} {output:q} {params.settings:q} 2>&1 | tee {log:q}"


# All of it on this machine, whichever made it: what moepress asks for where results are in a bucket (docs/scale.md).
rule here:
    input:
        PLAN.targets,
        [f"{RESULTS}/{folder}" for folder in PLAN.artefacts],
    log:
        local(f"{RESULTS}/logs/here.log"),
    localrule: True
    conda:
        "../../environment.yml"
    shell:
        ": 2> {log:q}"
