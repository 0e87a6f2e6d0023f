rule quantize_model:
    """Have INC itself quantize the model by a profile, and see that its error is the one that the profile promised.

    Not part of `all`: ask for it by name, or by `make quantize PROFILE=moderate`.
    """
    input:
        stale=made_again_where_stale("quantize_model"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        calibration=rules.extract_calibration.output.calibration,
        heldout=rules.extract_calibration.output.heldout,
        plan=rules.plan_quantization.output.plan,
        tradeoff=rules.measure_tradeoff.output.tradeoff,
        profiles=rules.build_profiles.output.profiles,
        exports=rules.export_profiles.output.index,
    output:
        model=f"{QUANTIZED}/best_model.pt",
        record=f"{QUANTIZED}/quantized.json",
    log:
        f"{RUN}/logs/quantize_model.log",
    benchmark:
        f"{RUN}/benchmarks/quantize_model.tsv"
    threads: 64
    params:
        code=code_digest("scripts/quantize_model.py"),
        versions=versions_of(*MEASURING),
        profile=config["quantize"]["profile"],
        directory=folder_of_output,
        config_digest=config_digest("quantize_model"),
    shell:
        "exec python scripts/quantize_model.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --calibration-set {input.calibration:q}"
        " --heldout-set {input.heldout:q}"
        " --plan {input.plan:q}"
        " --tradeoff {input.tradeoff:q}"
        " --profiles {input.profiles:q}"
        " --exports {input.exports:q}"
        " --profile {params.profile:q}"
        " --directory {params.directory:q}"
        " --record {output.record:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
