# Text and model: what everything else starts from.
rule corpus:
    input:
        task=task("corpus"),
    output:
        directory(f"{RESULTS}/corpus/{{id}}"),
    log:
        f"{RESULTS}/logs/corpus/{{id}}.log",
    conda:
        "../../environment.yml"
    shell:
        RUN


rule model:
    input:
        upstream("model"),
        task=task("model"),
    output:
        directory(f"{RESULTS}/model/{{id}}"),
    log:
        f"{RESULTS}/logs/model/{{id}}.log",
    threads: workflow.cores or 1
    conda:
        "../../environment.yml"
    shell:
        RUN


rule calibration:
    input:
        upstream("calibration"),
        task=task("calibration"),
    output:
        directory(f"{RESULTS}/calibration/{{id}}"),
    log:
        f"{RESULTS}/logs/calibration/{{id}}.log",
    conda:
        "../../environment.yml"
    shell:
        RUN
