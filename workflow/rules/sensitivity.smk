rule plan_quantization:
    """Have INC plan the quantization, so that what is measured is INC's own choice.

    A row of `ops` is one op that is quantized, with its observers and schemes; a row of `excluded` is one that is not,
    with the reason.
    """
    input:
        stale=made_again_where_stale("plan_quantization"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        calibration=rules.extract_calibration.output.calibration,
    output:
        plan=f"{RUN}/plan.json",
    log:
        f"{RUN}/logs/plan_quantization.log",
    benchmark:
        f"{RUN}/benchmarks/plan_quantization.tsv"
    params:
        code=code_digest("scripts/plan_quantization.py"),
        versions=versions_of(*MEASURING),
        spec=plan_spec,
        config_digest=config_digest("plan_quantization"),
    shell:
        "exec python scripts/plan_quantization.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --spec {params.spec:q}"
        " --plan {output.plan:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule capture_sensitivity:
    """Measure every op of the plan: the long step, so it holds the GPU's place.

    A record of a map is one op on one confidence batch, with the sum of squared errors at the measured op as INC's
    number. Records are kept in a journal beside the output, so that a killed run goes on where it ended. What differs
    from run to run, times and host, goes to the run record, which nothing downstream reads.
    """
    input:
        stale=made_again_where_stale("capture_sensitivity"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        calibration=rules.extract_calibration.output.calibration,
        plan=rules.plan_quantization.output.plan,
    output:
        capture=f"{RUN}/capture_{DEVICE}.json",
        run_record=f"{REPORT}.run.json",
    log:
        f"{RUN}/logs/capture_sensitivity.log",
    benchmark:
        f"{RUN}/benchmarks/capture_sensitivity.tsv"
    # As many as --cores allows; Snakemake lowers the number by itself.
    threads: 64
    resources:
        gpu=1 if DEVICE == "cuda" else 0,
    params:
        code=code_digest("scripts/capture_sensitivity.py"),
        versions=versions_of(*MEASURING),
        device=DEVICE,
        flags=replay_flags(),
        config_digest=config_digest("capture_sensitivity"),
    shell:
        "exec python scripts/capture_sensitivity.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --plan {input.plan:q}"
        " --device {params.device}"
        " {params.flags}"
        " --capture {output.capture:q}"
        " --run-record {output.run_record:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule audit_capture:
    """Have INC's unmodified helpers measure a sample of ops again: on the CPU every bit has to be the same.

    So INC measures at least once in every run, whatever the engine, and a report never rests on the replay alone.
    """
    input:
        stale=made_again_where_stale("audit_capture"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        calibration=rules.extract_calibration.output.calibration,
        plan=rules.plan_quantization.output.plan,
        capture=rules.capture_sensitivity.output.capture,
    output:
        audit=f"{RUN}/audit_{DEVICE}.json",
    log:
        f"{RUN}/logs/audit_capture.log",
    benchmark:
        f"{RUN}/benchmarks/audit_capture.tsv"
    threads: 64
    params:
        code=code_digest("scripts/audit_capture.py"),
        versions=versions_of(*MEASURING),
        ops=config["sensitivity"]["audit_ops"],
        config_digest=config_digest("audit_capture"),
    shell:
        "exec python scripts/audit_capture.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --plan {input.plan:q}"
        " --capture {input.capture:q}"
        " --ops {params.ops}"
        " --audit {output.audit:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule measure_tradeoff:
    """Measure the mixed-precision model on held-out samples for growing keep-lists, along the ranking and controls.

    A ranking has to earn its place: beside it stand random orders, the ranking turned round, and the largest weights
    first. A point of a curve is one keep-list; each forward's record is journalled, so a killed run goes on.
    """
    input:
        stale=made_again_where_stale("measure_tradeoff"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        calibration=rules.extract_calibration.output.calibration,
        heldout=rules.extract_calibration.output.heldout,
        plan=rules.plan_quantization.output.plan,
        capture=rules.capture_sensitivity.output.capture,
    output:
        tradeoff=f"{RUN}/tradeoff_{DEVICE}.json",
    log:
        f"{RUN}/logs/measure_tradeoff.log",
    benchmark:
        f"{RUN}/benchmarks/measure_tradeoff.tsv"
    threads: 64
    resources:
        gpu=1 if DEVICE == "cuda" else 0,
    params:
        code=code_digest("scripts/measure_tradeoff.py"),
        versions=versions_of(*MEASURING),
        batches=config["tradeoff"]["heldout_batches"],
        candidates=config["tradeoff"]["greedy_candidates"],
        ops=config["tradeoff"]["greedy_ops"],
        device=DEVICE,
        flags=replay_flags(),
        config_digest=config_digest("measure_tradeoff"),
    shell:
        "exec python scripts/measure_tradeoff.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --heldout-set {input.heldout:q}"
        " --plan {input.plan:q}"
        " --capture {input.capture:q}"
        " --batches {params.batches}"
        " --greedy-candidates {params.candidates}"
        " --greedy-ops {params.ops}"
        " --device {params.device}"
        " {params.flags}"
        " --tradeoff {output.tradeoff:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
