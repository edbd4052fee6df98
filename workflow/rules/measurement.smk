# What compression cost, and what it brought.
rule evaluation:
    input:
        upstream("evaluation"),
        task=task("evaluation"),
    output:
        directory(f"{RESULTS}/evaluation/{{id}}"),
    log:
        f"{RESULTS}/logs/evaluation/{{id}}.log",
    resources:
        gpu=PLAN.gpus,
    conda:
        "../../environment.yml"
    shell:
        RUN


# Timings are taken alone on the machine.
rule latency:
    input:
        upstream("latency"),
        task=task("latency"),
    output:
        directory(f"{RESULTS}/latency/{{id}}"),
    log:
        f"{RESULTS}/logs/latency/{{id}}.log",
    threads: workflow.cores or 1
    resources:
        gpu=PLAN.gpus,
    conda:
        "../../environment.yml"
    shell:
        RUN
