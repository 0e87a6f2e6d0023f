rule audit_capture:
    """Have INC and compressed-tensors measure a sample of ops again: on the CPU every bit has to be the same.

    INC's unmodified helpers measure in every run, with every engine, so no report depends on the replay alone. If INC
    cannot measure the model, torch's own quantized modules do. The modules of compressed-tensors measure its schemes.
    """
    input:
        **MEASURED,
        stale=made_again_where_stale("audit_capture"),
        capture=rules.capture_sensitivity.output.capture,
    output:
        audit=f"{RUN}/audit_{DEVICE}.json",
    log:
        f"{RUN}/logs/audit_capture.log",
    benchmark:
        f"{RUN}/benchmarks/audit_capture.tsv"
    threads: MEASURING_THREADS
    resources:
        mem_mb=memory("audit_capture"),
        limit_mb=LIMIT,
        runtime=minutes("audit_capture", "cpu"),
    params:
        script=script_path("audit_capture"),
        code=code_digest("scripts/audit_capture.py"),
        files=file_options,
        versions=versions_of(*MEASURING),
        ops=config["sensitivity"]["audit_ops"],
        config_digest=config_digest("audit_capture"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --ops {params.ops}"
        " --memory {resources.limit_mb}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
