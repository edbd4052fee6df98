# From a model to a packed checkpoint and the policy it runs under.
rule gradients:
    input:
        PLAN.upstream("gradients"),
        task=PLAN.task("gradients"),
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
    shell:
        RUN


# A block of layers, where statistics.blocks shares them out.
rule statistics_block:
    input:
        PLAN.upstream("statistics_block"),
        task=PLAN.task("statistics_block"),
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
    shell:
        RUN


rule statistics:
    input:
        PLAN.upstream("statistics"),
        task=PLAN.task("statistics"),
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
    shell:
        RUN


rule allocation:
    input:
        PLAN.upstream("allocation"),
        task=PLAN.task("allocation"),
    output:
        directory(f"{RESULTS}/allocation/{{id}}"),
    log:
        f"{RESULTS}/logs/allocation/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("allocation"),
    shell:
        RUN


rule quantization:
    input:
        PLAN.upstream("quantization"),
        task=PLAN.task("quantization"),
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
    shell:
        RUN


rule pruning:
    input:
        PLAN.upstream("pruning"),
        task=PLAN.task("pruning"),
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
    shell:
        RUN
