rule archive_results:
    """Pack the results of this model and calibration set into one tar file, and list the sha256 of each member in a second file.

    The run record, logs and benchmarks stay out. They hold times and the host, so archives of the same results would
    differ. The workflow itself is packed by `snakemake --archive`.
    """
    input:
        **DESCRIBED,
        stale=made_again_where_stale("archive_results"),
        samples=[
            rules.extract_calibration.output.calibration_set,
            rules.extract_calibration.output.heldout_set,
        ],
        plan=rules.plan_quantization.output.plan,
        scales=rules.calibrate_scales.output.scales,
        tensors=rules.calibrate_scales.output.tensors,
        capture=rules.capture_sensitivity.output.capture,
        audit=rules.audit_capture.output.audit,
        frontier=rules.measure_frontier.output.frontier,
        profiles=rules.build_profiles.output.profiles,
        why=rules.explain_units.output.why,
        exports=rules.export_profiles.output.index,
        report=rules.render_report.output.json,
        texts=[
            rules.render_report.output.markdown,
            rules.render_report.output.ranking_table,
            rules.render_report.output.frontier_table,
            rules.render_report.output.profiles_table,
        ],
        figures=rules.draw_figures.output,
        page=rules.render_page.output.html,
    output:
        archive=f"results/archives/{MODEL}-{CALIBRATION}.tar",
        checksums=f"results/archives/{MODEL}-{CALIBRATION}.tar.sha256.json",
    log:
        f"{RUN}/logs/archive_results.log",
    benchmark:
        f"{RUN}/benchmarks/archive_results.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("archive_results"),
        code=code_digest("scripts/archive_results.py"),
        files=files_to_pack,
        documents=documents_to_pack,
    shell:
        "exec python {params.script:q}"
        " --archive {output.archive:q} --checksums {output.checksums:q}"
        " --log {log:q}"
        " --documents {params.documents:q}"
        " -- {params.files:q}"
