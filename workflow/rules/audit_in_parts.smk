AUDIT_FOLDER = f"{RUN}/parts_{DEVICE}/{config_digest('audit_capture')[:8]}_{PARTS}"


rule audit_part:
    """Have INC and compressed-tensors measure one part of the sample of ops again.

    A row is one value that the capture has and that was measured again.
    """
    input:
        **MEASURED,
        capture=rules.capture_sensitivity.output.capture,
    output:
        audit=f"{AUDIT_FOLDER}/audit_{{number}}.json",
    log:
        f"{AUDIT_FOLDER}/audit_{{number}}.log",
    benchmark:
        f"{AUDIT_FOLDER}/audit_{{number}}.tsv"
    threads: MEASURING_THREADS
    resources:
        mem_mb=memory("audit_capture"),
        limit_mb=LIMIT,
        runtime=minutes("audit_capture", "cpu", share=1 / PARTS),
    params:
        script=script_path("audit_capture"),
        code=code_digest("scripts/audit_capture.py"),
        files=file_options,
        versions=versions_of(*MEASURING),
        ops=config["sensitivity"]["audit_ops"],
        parts=PARTS,
        config_digest=config_digest("audit_capture"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --number {wildcards.number} --parts {params.parts}"
        " --ops {params.ops}"
        " --memory {resources.limit_mb}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule audit_capture:
    """Join the parts of the audit, in which INC and compressed-tensors measured a sample of ops again.

    INC's unmodified helpers measure in every run, with every engine, so no report depends on the replay alone.
    """
    input:
        **DESCRIBED,
        stale=made_again_where_stale("audit_capture"),
        plan=rules.plan_quantization.output.plan,
        scales=rules.calibrate_scales.output.scales,
        capture=rules.capture_sensitivity.output.capture,
        audited=expand(rules.audit_part.output.audit, number=range(1, PARTS + 1)),
    output:
        audit=f"{RUN}/audit_{DEVICE}.json",
    log:
        f"{RUN}/logs/audit_capture.log",
    benchmark:
        f"{RUN}/benchmarks/audit_capture.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("join_audits"),
        code=code_digest("scripts/join_audits.py"),
        files=file_options,
        config_digest=config_digest("audit_capture"),
    shell:
        "exec python {params.script:q} {params.files}" " --config-digest {params.config_digest}" " --log {log:q}"
