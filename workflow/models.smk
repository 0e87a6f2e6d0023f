"""Several models and calibration sets in one run, and one page that compares their decisions.

    snakemake --snakefile workflow/models.smk --cores all --resources gpu=1

A row of config/models.tsv is a run. Each run is a module, so its rules have the model's name in front.
"""

import os
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")


include: "rules/checkout.smk"


ROOT = checkout_of(workflow.current_basedir)
sys.path.insert(0, str(ROOT / "src"))  # this checkout's library, installed or not

from auto_quantize_model.code import code_digest
from auto_quantize_model.escape import redacted
from auto_quantize_model.files import InputError
from auto_quantize_model.runs import read_runs

TABLE = Path("config/models.tsv")
try:
    RUNS = read_runs(
        TABLE if TABLE.exists() else ROOT / TABLE,
        ROOT,
        workflow.config_settings.configfiles,
        workflow.config_settings.config,
    )
except InputError as error:
    sys.exit(redacted(str(error)))


# Ignored without --sdm apptainer. Each run has its own image, and the page is made in the first.
container: image_of(workflow, next((spec.machine.image for spec in RUNS.values() if spec.machine.image), None))


for run, spec in RUNS.items():
    prefix = f"{run}_"

    module:
        name: run
        snakefile:
            "Snakefile"
        config:
            spec.model_dump(mode="json")

    use rule * from run as prefix*


include: "rules/signals.smk"


onstart:
    for run in RUNS:
        globals()[run].require_packages()
        globals()[run].require_device()
    stop_jobs_on_signals()


onsuccess:
    print(f"The page: {rules.compare_models.output.html}")


rule all:
    default_target: True
    input:
        [getattr(rules, f"{run}_all").input for run in RUNS],
        "results/models.html",


rule compare_models:
    """Put the decisions of all runs, and the uniform schemes that they measured, on one page.

    A row is a profile of one run. It links to the run's own page.
    """
    input:
        reports=[getattr(rules, f"{run}_render_report").output.json for run in RUNS],
        pages=[getattr(rules, f"{run}_render_page").output.html for run in RUNS],
    output:
        html="results/models.html",
    log:
        "results/logs/compare_models.log",
    benchmark:
        "results/benchmarks/compare_models.tsv"
    params:
        script=lambda wildcards, output: str(ROOT / "scripts/compare_models.py"),
        code=code_digest(ROOT, "scripts/compare_models.py", "src/auto_quantize_model/report/templates/models.html.j2"),
    shell:
        "exec python {params.script:q} --reports {input.reports:q} --pages {input.pages:q} --html {output.html:q}"
        " --log {log:q}"
