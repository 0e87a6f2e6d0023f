# The documents that describe the model and the samples.
DESCRIBED = dict(
    manifest=rules.get_model.output.manifest,
    calibration_manifest=rules.extract_calibration.output.calibration_manifest,
)


rule plan_quantization:
    """Have INC plan the quantization, so that the measured ops are INC's own choice.

    A row of `ops` is an op that INC quantizes, with its observers and schemes. A row of `excluded` is a module that
    stays in FP32, with the reason.
    """
    input:
        **DESCRIBED,
        stale=made_again_where_stale("plan_quantization"),
        calibration_set=rules.extract_calibration.output.calibration_set,
    output:
        plan=f"{RUN}/plan.json",
    log:
        f"{RUN}/logs/plan_quantization.log",
    benchmark:
        f"{RUN}/benchmarks/plan_quantization.tsv"
    threads: 1
    resources:
        mem_mb=memory("plan_quantization"),
        limit_mb=LIMIT,
        runtime=minutes("plan_quantization", "cpu"),
    params:
        script=script_path("plan_quantization"),
        code=code_digest("scripts/plan_quantization.py"),
        files=file_options,
        versions=versions_of(*MEASURING),
        spec=plan_spec,
        config_digest=config_digest("plan_quantization"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --spec {params.spec:q}"
        " --memory {resources.limit_mb}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


# The inputs of the rules that calibrate or measure.
PLANNED = dict(
    **DESCRIBED,
    calibration_set=rules.extract_calibration.output.calibration_set,
    plan=rules.plan_quantization.output.plan,
)


rule calibrate_scales:
    """Calibrate each scored batch alone, as INC does for a score, and the whole set, as for a deployed model.

    The tensors are scales and zero_points. The document lists what the observers saw: for each calibration and op the
    minimum, the maximum and percentiles.
    """
    input:
        **PLANNED,
        stale=made_again_where_stale("calibrate_scales"),
    output:
        scales=f"{RUN}/scales_{DEVICE}.json",
        tensors=f"{RUN}/scales_{DEVICE}.safetensors",
    log:
        f"{RUN}/logs/calibrate_scales.log",
    benchmark:
        f"{RUN}/benchmarks/calibrate_scales.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("calibrate_scales"),
        limit_mb=LIMIT,
        runtime=minutes("calibrate_scales"),
    params:
        **REPLAYED,
        script=script_path("calibrate_scales"),
        code=code_digest("scripts/calibrate_scales.py"),
        files=file_options,
        whole_set="--whole-set" if NEEDS_WHOLE_SET else "",
        config_digest=config_digest("calibrate_scales"),
    shell:
        "exec python {params.script:q} {params.files}"
        " {params.whole_set}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


# The inputs of each rule that measures.
MEASURED = dict(
    **PLANNED,
    scales=rules.calibrate_scales.output.scales,
    listed=rules.calibrate_scales.output.tensors,
)


include: "capture.smk" if PARTS == 1 else "capture_in_parts.smk"
# The ranks of a GPU's scores need all ops of the audit together.
include: "audit.smk" if PARTS == 1 or DEVICE == "cuda" else "audit_in_parts.smk"


# The forwards that are known from the start, in parts; none where one job does all.
HELDOUT_FOLDER = f"{RUN}/parts_{DEVICE}/{config_digest('measure_frontier')[:8]}_{PARTS}"
HELDOUT_PARTS = expand(
    f"{HELDOUT_FOLDER}/heldout_{{number}}.json",
    number=range(1, PARTS + 1) if PARTS > 1 and config["decide"]["heldout_batches"] else [],
)
# The params of a rule that measures on held-out samples.
ON_HELDOUT = dict(
    **REPLAYED,
    files=file_options,
    candidates=CANDIDATES,
    spec=block("decide"),
    target=block("profiles"),
    config_digest=config_digest("measure_frontier"),
)

if HELDOUT_PARTS:

    include: "heldout_in_parts.smk"


rule measure_frontier:
    """Choose a scheme for each unit of ops for growing budgets, and measure each choice on held-out samples.

    The controls are uniform schemes, random choices of equal bytes, and the first and last layers first. A point is one
    choice. The score store keeps the record of each forward, so a killed run resumes.
    """
    input:
        **MEASURED,
        stale=made_again_where_stale("measure_frontier"),
        heldout_set=rules.extract_calibration.output.heldout_set,
        capture=rules.capture_sensitivity.output.capture,
        heldout_parts=HELDOUT_PARTS,
    output:
        frontier=f"{RUN}/frontier_{DEVICE}.json",
    log:
        f"{RUN}/logs/measure_frontier.log",
    benchmark:
        f"{RUN}/benchmarks/measure_frontier.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("measure_frontier"),
        limit_mb=LIMIT,
        runtime=minutes("measure_frontier"),
    params:
        **ON_HELDOUT,
        script=script_path("measure_frontier"),
        code=code_digest("scripts/measure_frontier.py"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --candidates {params.candidates:q}"
        " --spec {params.spec:q}"
        " --target {params.target:q}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
