rule plan_quantization:
    """Have INC plan the quantization, so that what is measured is INC's own choice.

    A row of `ops` is one op that is quantized, with its observers and schemes; a row of `excluded` is one that is not,
    with the reason.
    """
    input:
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
        versions=measuring_versions(),
        spec=block("sensitivity"),
    shell:
        "exec python scripts/plan_quantization.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --spec {params.spec:q}"
        " --plan {output.plan:q}"
        " --log {log:q}"


rule capture_sensitivity:
    """Measure every op of the plan with INC's unmodified helpers: the long step, so it holds the GPU's place.

    A value of a map is the sum of squared errors at the measured output, per op and confidence batch. What differs
    from run to run, times and host, goes to the run record, which nothing downstream reads.
    """
    input:
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
        gpu=1,
    params:
        code=code_digest("scripts/capture_sensitivity.py"),
        versions=measuring_versions(),
    shell:
        "exec python scripts/capture_sensitivity.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --plan {input.plan:q}"
        " --capture {output.capture:q}"
        " --run-record {output.run_record:q}"
        " --log {log:q}"
