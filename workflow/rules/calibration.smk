rule extract_calibration:
    """Draw calibration and held-out samples, and check each of them against the model's own processor.

    The model is an input because its image processor and chat template give limits in pixels and tokens a meaning. A
    row of a set is one sample: a prompt, and perhaps an image and an answer.
    """
    input:
        stale=made_again_where_stale("extract_calibration"),
        manifest=rules.get_model.output.manifest,
    output:
        calibration_set=f"{RUN}/calibration/calibration.parquet",
        heldout_set=f"{RUN}/calibration/heldout.parquet",
        calibration_manifest=f"{RUN}/calibration_manifest.json",
    log:
        f"{RUN}/logs/extract_calibration.log",
    benchmark:
        f"{RUN}/benchmarks/extract_calibration.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(DOWNLOAD_TIME),
    params:
        script=script_path("extract_calibration"),
        code=code_digest("scripts/extract_calibration.py"),
        files=file_options,
        spec=block("calibration"),
        config_digest=config_digest("extract_calibration"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --spec {params.spec:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
