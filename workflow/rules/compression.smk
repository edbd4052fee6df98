# From a model to a packed checkpoint and the policy it runs under.
rule statistics:
    input:
        upstream("statistics"),
        task=task("statistics"),
    output:
        directory(f"{RESULTS}/statistics/{{id}}"),
    log:
        f"{RESULTS}/logs/statistics/{{id}}.log",
    resources:
        gpu=PLAN.gpus,
    conda:
        "../../environment.yml"
    shell:
        RUN


rule allocation:
    input:
        upstream("allocation"),
        task=task("allocation"),
    output:
        directory(f"{RESULTS}/allocation/{{id}}"),
    log:
        f"{RESULTS}/logs/allocation/{{id}}.log",
    conda:
        "../../environment.yml"
    shell:
        RUN


rule quantization:
    input:
        upstream("quantization"),
        task=task("quantization"),
    output:
        directory(f"{RESULTS}/quantization/{{id}}"),
    log:
        f"{RESULTS}/logs/quantization/{{id}}.log",
    resources:
        gpu=PLAN.gpus,
    conda:
        "../../environment.yml"
    shell:
        RUN


rule pruning:
    input:
        upstream("pruning"),
        task=task("pruning"),
    output:
        directory(f"{RESULTS}/pruning/{{id}}"),
    log:
        f"{RESULTS}/logs/pruning/{{id}}.log",
    conda:
        "../../environment.yml"
    shell:
        RUN
