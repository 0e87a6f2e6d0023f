# The parts of another config, or of another number of parts, lie in another folder, so none is taken for one of these.
PARTS_FOLDER = f"{RUN}/parts_{DEVICE}/{config_digest('capture_sensitivity')[:8]}_{PARTS}"
NUMBERS = range(1, PARTS + 1)
# Without estimates there are no probes.
PROBES = expand(
    f"{PARTS_FOLDER}/probes_{{number}}.json", number=NUMBERS if config["sensitivity"]["exact"] != "all" else []
)

# The params of a rule that does a part of the capture.
PART = dict(
    **REPLAYED,
    script=script_path("measure_part"),
    code=code_digest("scripts/measure_part.py"),
    files=file_options,
    parts=PARTS,
    effort=effort_flags(),
    candidates=CANDIDATES,
    config_digest=config_digest("capture_sensitivity"),
)


rule measure_probes:
    """Do one part of the probes, which estimate the score of every op in every scheme.

    A row of `probes` is one probe on one batch.
    """
    input:
        **MEASURED,
    output:
        part=f"{PARTS_FOLDER}/probes_{{number}}.json",
        run_record=f"{PARTS_FOLDER}/probes_{{number}}.run.json",
    log:
        f"{PARTS_FOLDER}/probes_{{number}}.log",
    benchmark:
        f"{PARTS_FOLDER}/probes_{{number}}.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("capture_sensitivity"),
        limit_mb=LIMIT,
        runtime=minutes("capture_sensitivity", share=1 / PARTS),
    params:
        **PART,
    shell:
        "exec python {params.script:q} {params.files}"
        " --number {wildcards.number} --parts {params.parts}"
        " {params.effort}"
        " --candidates {params.candidates:q}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule measure_scores:
    """Measure one part of the states, each by one run of the blocks from the first changed op on.

    The parts have nearly equal costs. A row of `scores` is one op of one map on one confidence batch.
    """
    input:
        **MEASURED,
        estimated=PROBES,
    output:
        part=f"{PARTS_FOLDER}/scores_{{number}}.json",
        run_record=f"{PARTS_FOLDER}/scores_{{number}}.run.json",
    log:
        f"{PARTS_FOLDER}/scores_{{number}}.log",
    benchmark:
        f"{PARTS_FOLDER}/scores_{{number}}.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("capture_sensitivity"),
        limit_mb=LIMIT,
        runtime=minutes("capture_sensitivity", share=1 / PARTS),
    params:
        **PART,
        estimated="" if PROBES else "--estimated",
    shell:
        "exec python {params.script:q} {params.files}"
        " {params.estimated}"
        " --number {wildcards.number} --parts {params.parts}"
        " {params.effort}"
        " --candidates {params.candidates:q}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule capture_sensitivity:
    """Join the parts of the capture, which several jobs measured. The capture has the bytes that one job would write.

    A row is one op of one map on one confidence batch. INC's number is the sum of squared errors at the measured op.
    """
    input:
        **DESCRIBED,
        stale=made_again_where_stale("capture_sensitivity"),
        plan=rules.plan_quantization.output.plan,
        scales=rules.calibrate_scales.output.scales,
        estimated=PROBES,
        measured=expand(rules.measure_scores.output.part, number=NUMBERS),
        records=[
            path.replace(".json", ".run.json")
            for path in [*PROBES, *expand(rules.measure_scores.output.part, number=NUMBERS)]
        ],
    output:
        capture=f"{RUN}/capture_{DEVICE}.json",
        run_record=f"{REPORT}.run.json",
    log:
        f"{RUN}/logs/capture_sensitivity.log",
    benchmark:
        f"{RUN}/benchmarks/capture_sensitivity.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("join_parts"),
        code=code_digest("scripts/join_parts.py"),
        files=file_options,
        config_digest=config_digest("capture_sensitivity"),
    shell:
        "exec python {params.script:q} {params.files}" " --config-digest {params.config_digest}" " --log {log:q}"
