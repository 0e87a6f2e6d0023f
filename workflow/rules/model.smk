rule get_model:
    """Get the model as a local snapshot, and write the manifest that represents it in all later steps.

    The weights are not a declared output. A manifest of kilobytes with a sha256 per file is easy to restore, compare
    and archive; gigabytes are not. A row of `files` is one file of the snapshot.
    """
    input:
        stale=made_again_where_stale("get_model"),
        shipped=shipped_snapshot,
    output:
        manifest=f"results/{MODEL}/model_manifest.json",
    log:
        f"results/{MODEL}/logs/get_model.log",
    benchmark:
        f"results/{MODEL}/benchmarks/get_model.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(DOWNLOAD_TIME),
    params:
        script=script_path("get_model"),
        code=code_digest("scripts/get_model.py"),
        name=MODEL,
        source=config["model"]["source"],
        path=verbatim(config["model"]["path"]),
        hub=hub_flags("model"),
        config_digest=config_digest("get_model"),
    shell:
        "exec python {params.script:q}"
        " --name {params.name:q}"
        " --source {params.source:q}"
        " --path {params.path:q}"
        " {params.hub}"
        " --manifest {output.manifest:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"
