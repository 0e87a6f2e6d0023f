rule measure_heldout:
    """Measure one part of the choices and controls of the frontier that are known from the start.

    A row of `records` is one choice on one batch.
    """
    input:
        **MEASURED,
        heldout_set=rules.extract_calibration.output.heldout_set,
        capture=rules.capture_sensitivity.output.capture,
    output:
        part=f"{HELDOUT_FOLDER}/heldout_{{number}}.json",
    log:
        f"{HELDOUT_FOLDER}/heldout_{{number}}.log",
    benchmark:
        f"{HELDOUT_FOLDER}/heldout_{{number}}.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("measure_frontier"),
        limit_mb=LIMIT,
        runtime=minutes("measure_frontier", share=1 / PARTS),
    params:
        **ON_HELDOUT,
        script=script_path("measure_heldout"),
        code=code_digest("scripts/measure_heldout.py"),
        parts=PARTS,
    shell:
        "exec python {params.script:q} {params.files}"
        " --number {wildcards.number} --parts {params.parts}"
        " --candidates {params.candidates:q}"
        " --spec {params.spec:q}"
        " --target {params.target:q}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
