rule capture_sensitivity:
    """Measure every op of the plan. This is the long step, and it reserves the GPU.

    A row is one op of one map on one confidence batch. INC's number is the sum of squared errors at the measured op.
    The score store keeps each score, so a killed run resumes. Times and host differ from run to run. They go to the run
    record, which no other rule reads.
    """
    input:
        **MEASURED,
        stale=made_again_where_stale("capture_sensitivity"),
    output:
        capture=f"{RUN}/capture_{DEVICE}.json",
        run_record=f"{REPORT}.run.json",
    log:
        f"{RUN}/logs/capture_sensitivity.log",
    benchmark:
        f"{RUN}/benchmarks/capture_sensitivity.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("capture_sensitivity"),
        limit_mb=LIMIT,
        runtime=minutes("capture_sensitivity"),
    params:
        **REPLAYED,
        script=script_path("capture_sensitivity"),
        code=code_digest("scripts/capture_sensitivity.py"),
        files=file_options,
        effort=effort_flags(),
        candidates=CANDIDATES,
        config_digest=config_digest("capture_sensitivity"),
    shell:
        "exec python {params.script:q} {params.files}"
        " {params.effort}"
        " --candidates {params.candidates:q}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
