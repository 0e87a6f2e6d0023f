rule quantize_model:
    """Quantize the model by a profile, load the result back, and check that its error is the error of the profile.

    The result is a checkpoint of compressed-tensors, or INC's model for a profile in inc_int8. The record lists the
    files with the weights, so the rule runs again if one is gone. `all` does not include this rule. Name it, or run
    `make quantize PROFILE=balanced`.
    """
    input:
        **MEASURED,
        stale=made_again_where_stale("quantize_model"),
        heldout_set=rules.extract_calibration.output.heldout_set,
        frontier=rules.measure_frontier.output.frontier,
        profiles=rules.build_profiles.output.profiles,
        exports=rules.export_profiles.output.index,
    output:
        record=f"{QUANTIZED}/quantized.json",
    log:
        f"{RUN}/logs/quantize_model.log",
    benchmark:
        f"{RUN}/benchmarks/quantize_model.tsv"
    threads: MEASURING_THREADS
    resources:
        mem_mb=memory("quantize_model"),
        runtime=minutes("quantize_model", "cpu"),
    params:
        script=script_path("quantize_model"),
        code=code_digest("scripts/quantize_model.py"),
        files=file_options,
        versions=versions_of(*MEASURING),
        profile=config["quantize"]["profile"],
        directory=folder_of_output,
        config_digest=config_digest("quantize_model"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --profile {params.profile:q}"
        " --directory {params.directory:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
