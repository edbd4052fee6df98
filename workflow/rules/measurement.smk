# What compression cost, and what it brought.
rule evaluation:
    input:
        PLAN.upstream("evaluation"),
    output:
        directory(f"{RESULTS}/evaluation/{{id}}"),
    log:
        f"{RESULTS}/logs/evaluation/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("evaluation", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("evaluation"),
    params:
        task=PLAN.task("evaluation"),
    shell:
        RUN


rule divergence:
    input:
        PLAN.upstream("divergence"),
    output:
        directory(f"{RESULTS}/divergence/{{id}}"),
    log:
        f"{RESULTS}/logs/divergence/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("divergence", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("divergence"),
    params:
        task=PLAN.task("divergence"),
    shell:
        RUN


rule decomposition:
    input:
        PLAN.upstream("decomposition"),
    output:
        directory(f"{RESULTS}/decomposition/{{id}}"),
    log:
        f"{RESULTS}/logs/decomposition/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("decomposition", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("decomposition"),
    params:
        task=PLAN.task("decomposition"),
    shell:
        RUN


# Timings are taken alone on the machine.
rule latency:
    input:
        PLAN.upstream("latency"),
    output:
        directory(f"{RESULTS}/latency/{{id}}"),
    log:
        f"{RESULTS}/logs/latency/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: ALL_CORES
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("latency"),
    params:
        task=PLAN.task("latency"),
    shell:
        RUN
