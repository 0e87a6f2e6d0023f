rule build_profiles:
    """Name measured keep-lists: `minimal`, `moderate`, `aggressive`, `max`, and the smallest that reaches the target.

    A profile is a point of a measured curve with all the ops that it keeps.
    """
    input:
        stale=made_again_where_stale("build_profiles"),
        plan=rules.plan_quantization.output.plan,
        tradeoff=rules.measure_tradeoff.output.tradeoff,
    output:
        profiles=f"{RUN}/profiles_{DEVICE}.json",
    log:
        f"{RUN}/logs/build_profiles.log",
    benchmark:
        f"{RUN}/benchmarks/build_profiles.tsv"
    params:
        code=code_digest("scripts/build_profiles.py"),
        target=block("profiles"),
        config_digest=config_digest("build_profiles"),
    shell:
        "exec python scripts/build_profiles.py"
        " --tradeoff {input.tradeoff:q}"
        " --plan {input.plan:q}"
        " --target {params.target:q}"
        " --profiles {output.profiles:q}"
        " --config-digest {params.config_digest}"
        " --log {log:q}"


rule export_profiles:
    """Write each profile in the words of the tools that apply it, checked against the model's module names.

    An entry of index.json is a profile's export to one tool, with what was dropped or added for it.
    """
    input:
        stale=made_again_where_stale("export_profiles"),
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        plan=rules.plan_quantization.output.plan,
        capture=rules.capture_sensitivity.output.capture,
        profiles=rules.build_profiles.output.profiles,
    output:
        # A file, as Snakemake empties an output that is a folder before a job and after one that failed.
        index=f"{RUN}/exports_{DEVICE}/index.json",
    log:
        f"{RUN}/logs/export_profiles.log",
    benchmark:
        f"{RUN}/benchmarks/export_profiles.tsv"
    params:
        code=code_digest("scripts/export_profiles.py", "src/auto_quantize_model/export/templates"),
        directory=folder_of_output,
    shell:
        "exec python scripts/export_profiles.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --plan {input.plan:q}"
        " --capture {input.capture:q}"
        " --profiles {input.profiles:q}"
        " --directory {params.directory:q}"
        " --log {log:q}"


rule render_report:
    """Turn the capture into the report, for people (Markdown), for programs (JSON) and for spreadsheets (CSV).

    A row of the primary table is one op, least to most sensitive. All files are the same bytes for the same inputs.
    """
    input:
        manifest=rules.get_model.output.manifest,
        calibration_manifest=rules.extract_calibration.output.manifest,
        plan=rules.plan_quantization.output.plan,
        capture=rules.capture_sensitivity.output.capture,
        audit=rules.audit_capture.output.audit,
        tradeoff=rules.measure_tradeoff.output.tradeoff,
        profiles=rules.build_profiles.output.profiles,
    output:
        markdown=report(f"{REPORT}.md", caption="../report/report.rst", category="Report"),
        json=f"{REPORT}.json",
        ranking=report(
            f"{TABLES}/ranking.csv",
            caption="../report/table_ranking.rst",
            category="Tables",
        ),
        tradeoff=report(
            f"{TABLES}/tradeoff.csv",
            caption="../report/table_tradeoff.rst",
            category="Tables",
        ),
        profiles=report(
            f"{TABLES}/profiles.csv",
            caption="../report/profiles.rst",
            category="Tables",
        ),
    log:
        f"{RUN}/logs/render_report.log",
    benchmark:
        f"{RUN}/benchmarks/render_report.tsv"
    params:
        # Templates are part of the code: as inputs they would have new times in every fresh clone.
        code=code_digest(
            "scripts/render_report.py",
            "src/auto_quantize_model/report/templates/op_sensitivity.md.j2",
            "src/auto_quantize_model/report/templates/op_sensitivity.json.j2",
            "src/auto_quantize_model/report/schema.json",
        ),
    shell:
        "exec python scripts/render_report.py"
        " --manifest {input.manifest:q}"
        " --calibration-manifest {input.calibration_manifest:q}"
        " --plan {input.plan:q}"
        " --capture {input.capture:q}"
        " --audit {input.audit:q}"
        " --tradeoff {input.tradeoff:q}"
        " --profiles {input.profiles:q}"
        " --markdown {output.markdown:q}"
        " --json {output.json:q}"
        " --ranking-table {output.ranking:q}"
        " --tradeoff-table {output.tradeoff:q}"
        " --profiles-table {output.profiles:q}"
        " --log {log:q}"


rule draw_figures:
    """Draw the report's pictures: sensitivity by block, all ops ranked, the trade-off, image against text tokens.

    What was not measured is a picture that says so, so that the same files are always there.
    """
    input:
        json=rules.render_report.output.json,
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
        tradeoff=report(
            f"{FIGURES}/tradeoff.svg",
            caption="../report/tradeoff.rst",
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
    params:
        code=code_digest("scripts/draw_figures.py"),
        versions=versions_of(*DRAWING),
        directory=folder_of_output,
    shell:
        "exec python scripts/draw_figures.py"
        " --report {input.json:q}"
        " --directory {params.directory:q}"
        " --log {log:q}"


rule render_page:
    """Put the report into one HTML page that needs no network: pictures to point at, a table to sort and filter."""
    input:
        json=rules.render_report.output.json,
        markdown=rules.render_report.output.markdown,
        tables=[
            rules.render_report.output.ranking,
            rules.render_report.output.tradeoff,
            rules.render_report.output.profiles,
        ],
        figures=rules.draw_figures.output,
        exports=rules.export_profiles.output.index,
    output:
        html=report(f"{REPORT}.html", caption="../report/page.rst", category="Report"),
    log:
        f"{RUN}/logs/render_page.log",
    benchmark:
        f"{RUN}/benchmarks/render_page.tsv"
    params:
        code=code_digest("scripts/render_page.py", "src/auto_quantize_model/report/templates/op_sensitivity.html.j2"),
        versions=versions_of(*DRAWING),
    shell:
        "exec python scripts/render_page.py"
        " --report {input.json:q}"
        " --markdown {input.markdown:q}"
        " --tables {input.tables:q}"
        " --files {input.figures:q}"
        " --exports {input.exports:q}"
        " --html {output.html:q}"
        " --log {log:q}"


rule publish_summary:
    """Copy the report to its stable place, whose path does not change with the calibration set or the device."""
    input:
        stale=made_again_where_stale("publish_summary"),
        markdown=rules.render_report.output.markdown,
        json=rules.render_report.output.json,
    output:
        markdown=f"context/summaries/inc-kb/{MODEL}_mse_sensitivity.md",
        json=f"context/summaries/inc-kb/{MODEL}_mse_sensitivity.json",
    log:
        f"{RUN}/logs/publish_summary.log",
    benchmark:
        f"{RUN}/benchmarks/publish_summary.tsv"
    params:
        code=code_digest("scripts/publish_summary.py"),
    shell:
        "exec python scripts/publish_summary.py"
        " --markdown {input.markdown:q}"
        " --json {input.json:q}"
        " --into-markdown {output.markdown:q}"
        " --into-json {output.json:q}"
        " --log {log:q}"
