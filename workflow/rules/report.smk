rule build_profiles:
    """Name measured choices: `smallest` reaches the target, `balanced` is the knee, and `safest` is within the budget.

    A profile is a measured point, with the scheme of each op.
    """
    input:
        stale=made_again_where_stale("build_profiles"),
        plan=rules.plan_quantization.output.plan,
        frontier=rules.measure_frontier.output.frontier,
    output:
        profiles=f"{RUN}/profiles_{DEVICE}.json",
    log:
        f"{RUN}/logs/build_profiles.log",
    benchmark:
        f"{RUN}/benchmarks/build_profiles.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("build_profiles"),
        code=code_digest("scripts/build_profiles.py"),
        files=file_options,
        target=block("profiles"),
        config_digest=config_digest("build_profiles"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --target {params.target:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule explain_units:
    """Explain why the worst units break, and measure the cures that cost no bytes.

    A cause is one unit in one scheme: each side alone, outlier channels, clipped values, kurtosis, and what each cure
    regains on held-out samples. The score store keeps the record of each forward, so a killed run resumes.
    """
    input:
        **MEASURED,
        stale=made_again_where_stale("explain_units"),
        heldout_set=rules.extract_calibration.output.heldout_set,
        frontier=rules.measure_frontier.output.frontier,
        profiles=rules.build_profiles.output.profiles,
    output:
        why=f"{RUN}/why_{DEVICE}.json",
    log:
        f"{RUN}/logs/explain_units.log",
    benchmark:
        f"{RUN}/benchmarks/explain_units.tsv"
    threads: MEASURING_THREADS
    resources:
        **ONE_GPU,
        mem_mb=memory("explain_units"),
        limit_mb=LIMIT,
        runtime=minutes("explain_units"),
    params:
        **REPLAYED,
        script=script_path("explain_units"),
        code=code_digest("scripts/explain_units.py"),
        files=file_options,
        config_digest=config_digest("explain_units"),
    shell:
        "exec python {params.script:q} {params.files}"
        " --device {params.device}"
        " --memory {resources.limit_mb}"
        " {params.flags}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule export_profiles:
    """Write each profile as files for the tools that apply it, checked against the model's module names.

    An entry of index.json is the export of a profile to one tool, with the ops that were dropped or added for the tool.
    """
    input:
        **DESCRIBED,
        stale=made_again_where_stale("export_profiles"),
        plan=rules.plan_quantization.output.plan,
        profiles=rules.build_profiles.output.profiles,
        why=rules.explain_units.output.why,
    output:
        # A file: Snakemake empties an output that is a folder, before a job and after a job that failed.
        index=f"{RUN}/exports_{DEVICE}/index.json",
    log:
        f"{RUN}/logs/export_profiles.log",
    benchmark:
        f"{RUN}/benchmarks/export_profiles.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("export_profiles"),
        code=code_digest("scripts/export_profiles.py", "src/auto_quantize_model/export/templates"),
        files=input_options,
        directory=folder_of_output,
    shell:
        "exec python {params.script:q} {params.files}" " --directory {params.directory:q}" " --log {log:q}"


rule render_report:
    """Write the report for people (Markdown), for programs (JSON) and for spreadsheets (CSV).

    A row of the primary table is one op. All files are the same bytes for the same inputs.
    """
    input:
        **DESCRIBED,
        plan=rules.plan_quantization.output.plan,
        capture=rules.capture_sensitivity.output.capture,
        audit=rules.audit_capture.output.audit,
        frontier=rules.measure_frontier.output.frontier,
        profiles=rules.build_profiles.output.profiles,
        why=rules.explain_units.output.why,
    output:
        markdown=report(f"{REPORT}.md", caption="../report/report.rst", category="Report"),
        json=f"{REPORT}.json",
        ranking_table=report(
            f"{TABLES}/ranking.csv",
            caption="../report/table_ranking.rst",
            category="Tables",
        ),
        frontier_table=report(
            f"{TABLES}/frontier.csv",
            caption="../report/table_frontier.rst",
            category="Tables",
        ),
        profiles_table=report(
            f"{TABLES}/profiles.csv",
            caption="../report/profiles.rst",
            category="Tables",
        ),
    log:
        f"{RUN}/logs/render_report.log",
    benchmark:
        f"{RUN}/benchmarks/render_report.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("render_report"),
        # Templates are part of the code. As inputs they would have new times in every fresh clone.
        code=code_digest(
            "scripts/render_report.py",
            "src/auto_quantize_model/report/templates/op_sensitivity.md.j2",
            "src/auto_quantize_model/report/templates/op_sensitivity.json.j2",
            "src/auto_quantize_model/report/schema.json",
        ),
        files=file_options,
    shell:
        "exec python {params.script:q} {params.files}" " --log {log:q}"


rule draw_figures:
    """Draw the report's pictures: sensitivity by block, all ops ranked, the frontier, image against text tokens.

    The same files are always written. If something was not measured, its picture says so.
    """
    input:
        report=rules.render_report.output.json,
    output:
        heat_map=report(
            f"{FIGURES}/heat_map.svg",
            caption="../report/heat_map.rst",
            category="Pictures",
        ),
        ranked_ops=report(
            f"{FIGURES}/ranked_ops.svg",
            caption="../report/ranked_ops.rst",
            category="Pictures",
        ),
        frontier=report(
            f"{FIGURES}/frontier.svg",
            caption="../report/frontier.rst",
            category="Pictures",
        ),
        modalities=report(
            f"{FIGURES}/modalities.svg",
            caption="../report/modalities.rst",
            category="Pictures",
        ),
        png=[f"{FIGURES}/{name}.png" for name in FIGURE_NAMES],
    log:
        f"{RUN}/logs/draw_figures.log",
    benchmark:
        f"{RUN}/benchmarks/draw_figures.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("draw_figures"),
        code=code_digest("scripts/draw_figures.py"),
        files=input_options,
        versions=versions_of(*DRAWING),
        directory=folder_of_output,
    shell:
        "exec python {params.script:q} {params.files}" " --directory {params.directory:q}" " --log {log:q}"


rule render_page:
    """Put the report into one HTML page that needs no network, with pictures and a table to sort and filter."""
    input:
        report=rules.render_report.output.json,
        markdown=rules.render_report.output.markdown,
        tables=[
            rules.render_report.output.ranking_table,
            rules.render_report.output.frontier_table,
            rules.render_report.output.profiles_table,
        ],
        files=rules.draw_figures.output,
        exports=rules.export_profiles.output.index,
    output:
        html=report(f"{REPORT}.html", caption="../report/page.rst", category="Report"),
    log:
        f"{RUN}/logs/render_page.log",
    benchmark:
        f"{RUN}/benchmarks/render_page.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("render_page"),
        code=code_digest(
            "scripts/render_page.py",
            "src/auto_quantize_model/report/templates/op_sensitivity.html.j2",
            "src/auto_quantize_model/report/allocate.js",
            "src/auto_quantize_model/report/page.js",
            "src/auto_quantize_model/report/page.css",
        ),
        files=file_options,
        versions=versions_of(*DRAWING),
    shell:
        "exec python {params.script:q} {params.files}" " --log {log:q}"


rule publish_summary:
    """Copy the report to a path that does not change with the calibration set or the device."""
    input:
        stale=made_again_where_stale("publish_summary"),
        markdown=rules.render_report.output.markdown,
        json=rules.render_report.output.json,
    output:
        into_markdown=f"context/summaries/inc-kb/{MODEL}_mse_sensitivity.md",
        into_json=f"context/summaries/inc-kb/{MODEL}_mse_sensitivity.json",
    log:
        f"{RUN}/logs/publish_summary.log",
    benchmark:
        f"{RUN}/benchmarks/publish_summary.tsv"
    threads: 1
    resources:
        mem_mb=SMALL_MEMORY,
        runtime=doubled(SMALL_TIME),
    params:
        script=script_path("publish_summary"),
        code=code_digest("scripts/publish_summary.py"),
        files=file_options,
    shell:
        "exec python {params.script:q} {params.files}" " --log {log:q}"
