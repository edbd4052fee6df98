# Text and model: what everything else starts from.
rule corpus:
    output:
        directory(f"{RESULTS}/corpus/{{id}}"),
    log:
        f"{RESULTS}/logs/corpus/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("corpus"),
    params:
        task=PLAN.task("corpus"),
    shell:
        RUN


rule model:
    input:
        PLAN.upstream("model"),
    output:
        directory(f"{RESULTS}/model/{{id}}"),
    log:
        f"{RESULTS}/logs/model/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: ALL_CORES
    resources:
        gpu=PLAN.gpus_of_model,
        mem_mb=PLAN.memory("model"),
    params:
        task=PLAN.task("model"),
    shell:
        RUN


rule calibration:
    input:
        PLAN.upstream("calibration"),
    output:
        directory(f"{RESULTS}/calibration/{{id}}"),
    log:
        f"{RESULTS}/logs/calibration/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("calibration"),
    params:
        task=PLAN.task("calibration"),
    shell:
        RUN
