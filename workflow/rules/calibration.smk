rule extract_calibration:
    """Draw calibration and held-out samples, and check each of them against the model's own processor.

    It needs the model because limits in pixels and tokens mean something only through that model's image processor
    and chat template. A row of either set is one sample: an image or none, a prompt, an answer or none.
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
    params:
        code=code_digest("scripts/extract_calibration.py"),
        files=file_options,
        spec=block("calibration"),
        config_digest=config_digest("extract_calibration"),
    shell:
        "exec python scripts/extract_calibration.py {params.files}"
        " --spec {params.spec:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
