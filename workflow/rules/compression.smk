# From a model to a packed checkpoint and the policy it runs under.
rule gradients:
    input:
        PLAN.upstream("gradients"),
    output:
        directory(f"{RESULTS}/gradients/{{id}}"),
    log:
        f"{RESULTS}/logs/gradients/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("gradients", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("gradients"),
    params:
        task=PLAN.task("gradients"),
    shell:
        RUN


# A block of layers, where statistics.blocks shares them out.
rule statistics_block:
    input:
        PLAN.upstream("statistics_block"),
    output:
        directory(f"{RESULTS}/statistics_block/{{id}}"),
    log:
        f"{RESULTS}/logs/statistics_block/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("statistics_block", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("statistics_block"),
    params:
        task=PLAN.task("statistics_block"),
    shell:
        RUN


rule statistics:
    input:
        PLAN.upstream("statistics"),
    output:
        directory(f"{RESULTS}/statistics/{{id}}"),
    log:
        f"{RESULTS}/logs/statistics/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("statistics", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("statistics"),
    params:
        task=PLAN.task("statistics"),
    shell:
        RUN


rule allocation:
    input:
        PLAN.upstream("allocation"),
    output:
        directory(f"{RESULTS}/allocation/{{id}}"),
    log:
        f"{RESULTS}/logs/allocation/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("allocation"),
    params:
        task=PLAN.task("allocation"),
    shell:
        RUN


rule quantization:
    input:
        PLAN.upstream("quantization"),
    output:
        directory(f"{RESULTS}/quantization/{{id}}"),
    log:
        f"{RESULTS}/logs/quantization/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("quantization", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("quantization"),
    params:
        task=PLAN.task("quantization"),
    shell:
        RUN


rule pruning:
    input:
        PLAN.upstream("pruning"),
    output:
        directory(f"{RESULTS}/pruning/{{id}}"),
    log:
        f"{RESULTS}/logs/pruning/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("pruning", ALL_CORES)
    resources:
        gpu=PLAN.gpus,
        mem_mb=PLAN.memory("pruning"),
    params:
        task=PLAN.task("pruning"),
    shell:
        RUN
