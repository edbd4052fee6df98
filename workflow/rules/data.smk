# Text and model: what everything else starts from.
rule corpus:
    input:
        task=PLAN.task("corpus"),
    output:
        directory(f"{RESULTS}/corpus/{{id}}"),
    log:
        f"{RESULTS}/logs/corpus/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("corpus"),
    shell:
        RUN


rule model:
    input:
        PLAN.upstream("model"),
        task=PLAN.task("model"),
    output:
        directory(f"{RESULTS}/model/{{id}}"),
    log:
        f"{RESULTS}/logs/model/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: ALL_CORES
    resources:
        mem_mb=PLAN.memory("model"),
    shell:
        RUN


rule calibration:
    input:
        PLAN.upstream("calibration"),
        task=PLAN.task("calibration"),
    output:
        directory(f"{RESULTS}/calibration/{{id}}"),
    log:
        f"{RESULTS}/logs/calibration/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=PLAN.memory("calibration"),
    shell:
        RUN
