"""Names of a run, and functions that tell Snakemake what a job depends on apart from its inputs."""

import filecmp
import json
import os
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from snakemake.logging import logger

from auto_quantize_model.archive import why_outdated
from auto_quantize_model.code import code_digest as digest_of_code
from auto_quantize_model.config import PlanSpec
from auto_quantize_model.config_text import require_sources
from auto_quantize_model.documents import why_stale
from auto_quantize_model.escape import redacted
from auto_quantize_model.files import InputError, digest_of, require_endpoint
from auto_quantize_model.data.local_sources import why_other_checkpoint, why_other_samples, why_other_snapshot
from auto_quantize_model.commands.run import DOCUMENTS

PLAN_KEYS = tuple(PlanSpec.model_fields)  # the other keys of the block sensitivity are read where they are used

# The packages that scores depend on, and those that draw.
MEASURING = ("neural-compressor", "compressed-tensors", "torch", "transformers", "numpy")
DRAWING = ("altair", "vl-convert-python")


def chosen_device():
    """The device that was asked for, which is part of the names of results: the config's, or with `--resources gpu=0` cpu.

    What this host has does not count: a job finds its device where it runs. The Snakemake that an executor starts on
    another host gets the config and not `--resources`, so the answer goes into the config that it gets.
    """
    gpus = getattr(workflow, "global_resources", {}).get("gpu")
    asked = config["sensitivity"]["device"]
    if gpus is None or gpus.value != 0 or asked == "cpu":
        return asked
    block = {**(given.config.get("sensitivity") or {}), "device": "cpu"}
    given.config_args = [*(given.config_args or []), f"sensitivity={json.dumps(block)}"]
    return "cpu"


def require_packages():
    """End a run before the first job if its jobs would run in this Python without their packages."""
    if MISSING and workflow.local_exec and not in_containers(workflow):
        sys.exit(
            f"This Python ({sys.executable}) has no {', '.join(MISSING)}, so it can plan and not measure; install them"
            " (make setup), and run the Snakemake of that environment (.venv/bin/snakemake)"
        )


def require_device():
    """End a run without its GPU before the first job. Jobs on other machines or in containers check for themselves."""
    jobs = workflow.dag.needrun_jobs()
    if DEVICE != "cuda" or not workflow.local_exec or in_containers(workflow):
        return
    if not any(getattr(job.resources, "gpu", 0) for job in jobs):
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"config: sensitivity.device: cuda, and this build of torch ({torch.__version__}) sees no GPU; set cpu, pass"
            " --resources gpu=0, or install a CUDA build"
        )


DEVICE = chosen_device()
MODEL = config["model"]["name"]
CALIBRATION = config["calibration"]["name"]
RUN = f"results/{MODEL}/{CALIBRATION}"
FIGURES = f"{RUN}/figures_{DEVICE}"
TABLES = f"{RUN}/tables_{DEVICE}"
FIGURE_NAMES = ("heat_map", "ranked_ops", "frontier", "modalities")
QUANTIZED = f"{RUN}/quantized_{DEVICE}/{config['quantize']['profile']}"
REPORT = f"{RUN}/op_sensitivity_mse_v2_{DEVICE}"


def verbatim(text):
    """A param that is `text` as it is: Snakemake would read braces of a plain string as wildcards."""
    return lambda wildcards: text


def block(*keys):
    """A block of the config as JSON, the same text for the same values."""
    value = config
    for key in keys:
        value = value[key]
    return verbatim(json.dumps(value, sort_keys=True))


def plan_spec(wildcards):
    """The keys of the sensitivity block that the plan depends on, as JSON."""
    return json.dumps({key: config["sensitivity"][key] for key in PLAN_KEYS}, sort_keys=True)


def folder_of_output(wildcards, output):
    """The folder of a rule's outputs, which lie in one folder."""
    return str(Path(output[0]).parent)


def input_options(wildcards, input):
    """A rule's inputs as options of its script. An input has the name of its option.

    `stale` has no files, so it makes no option. `listed` makes none either: a script finds these files by the document
    that lists them, but a host without shared files gets inputs alone. Snakemake does not rerun a job when such a param
    changes. It compares the inputs themselves.
    """
    named = {name: path for name, path in input.items() if name != "listed"}
    paths = {name: shlex.join([path] if isinstance(path, str) else path) for name, path in named.items()}
    return " ".join(f"--{name.replace('_', '-')} {words}" for name, words in paths.items() if words)


def file_options(wildcards, input, output):
    """A rule's inputs and outputs as options of its script, as `input_options` writes them."""
    return f"{input_options(wildcards, input)} {input_options(wildcards, output)}".strip()


def files_to_pack(wildcards, input):
    """The files of an archive: the rule's inputs, and for the index of the exports its whole folder."""
    return [str(Path(path).parent) if path == input.exports else path for path in input]


def documents_to_pack(wildcards, input):
    """The documents of an archive, which must be of one run, as KIND=FILE."""
    kinds = {option: kind for option, kind in DOCUMENTS.items() if option in input.keys()}
    return [f"{kind}={getattr(input, option)}" for option, kind in kinds.items()]


def script_path(name):
    """A script of the checkout; from the checkout itself as a short path, so that a printed command runs by hand.

    Snakemake does not rerun a job when such a param changes, so a checkout at another place reruns nothing.
    """
    path = Path("scripts" if ROOT.samefile(".") else ROOT / "scripts", f"{name}.py")
    return lambda wildcards, output: str(path)


def hub_flags(name):
    """Repository and revision of a block whose source is the hub, as its script takes them."""
    if config[name]["source"] != "hub":
        return ""
    repo_id, revision = (shlex.quote(config[name][key]) for key in ("repo_id", "revision"))
    return verbatim(f"--repo-id {repo_id} --revision {revision}")


def shipped_snapshot(wildcards):
    """The files of the shipped snapshot, which are part of the repository; the files of another model are not.

    Their times do not count, because a clone has new ones: `why_model_stale` compares the contents. A run elsewhere
    has no such inputs, because Snakemake would run the job again once the checkout has another place.
    """
    if config["model"]["source"] != "digits" or not ROOT.samefile("."):
        return []
    return [ancient(str(path)) for path in sorted(Path(config["model"]["path"]).glob("*"))]


def replay_flags():
    """The options of a replay that are on, as its scripts take them."""
    threads = config["sensitivity"]["threads"]
    flags = {
        "--tf32": config["sensitivity"]["tf32"],
        "--nondeterministic": not config["sensitivity"]["deterministic"],
        f"--threads {threads}": threads is not None,
    }
    return " ".join(flag for flag, on in flags.items() if on)


def effort_flags():
    """Which scores the capture measures, as its script takes them."""
    exact, budget = (config["sensitivity"][key] for key in ("exact", "time_budget"))
    return f"--exact {exact}" + (f" --time-budget {budget}" if budget else "")


CANDIDATES = list(checked.candidates)
PARTS = config["sensitivity"]["parts"]
# The frontier needs the scales of the whole set, and schemes of compressed-tensors need its input ranges.
NEEDS_WHOLE_SET = bool(config["decide"]["heldout_batches"]) or len(config["sensitivity"]["schemes"]) > 1
# The keys of the model block that matter, by source.
MODEL_KEYS = {"digits": (), "smollm2": (), "local": (), "hub": ("repo_id", "revision")}
# The part of the config that each rule's document depends on, apart from the parts that other documents depend on.
ASKED = {
    "get_model": {
        key: config["model"][key] for key in ("name", "source", "path", *MODEL_KEYS[config["model"]["source"]])
    },
    "extract_calibration": config["calibration"],
    "plan_quantization": {key: config["sensitivity"][key] for key in PLAN_KEYS},
    "calibrate_scales": [DEVICE, replay_flags(), NEEDS_WHOLE_SET],
    "capture_sensitivity": [DEVICE, replay_flags(), effort_flags(), CANDIDATES],
    "audit_capture": config["sensitivity"]["audit_ops"],
    "measure_frontier": [config["decide"], config["profiles"], CANDIDATES, DEVICE, replay_flags()],
    "build_profiles": config["profiles"],
    "explain_units": [DEVICE, replay_flags()],
    "quantize_model": config["quantize"],
}


def config_digest(rule):
    """The digest of the part of the config that a rule's document depends on. The document records it."""
    return digest_of(ASKED[rule])


def placed(path):
    """The path of an output, in the folder that the `prefix` of a module names."""
    return Path(workflow.modifier.path_modifier.replace_prefix(path))


def is_made(rule, document):
    """Whether a rule's document exists and was made by this config."""
    return placed(document).exists() and not why_stale(placed(document), config_digest(rule))


try:
    require_endpoint(os.environ.get("HF_ENDPOINT") or None)
    require_sources(
        checked,
        placed(f"results/{MODEL}/model_manifest.json"),
        is_made("extract_calibration", f"{RUN}/calibration_manifest.json"),
        is_made("plan_quantization", f"{RUN}/plan.json"),
    )
except InputError as error:
    sys.exit(redacted(str(error)))


def made_again_where_stale(rule):
    """An input function without files, which checks the rule's outputs when Snakemake asks for its inputs.

    Outputs of another config or of other local files go on Snakemake's list of files to make again. So do outputs that
    lack files, and outdated copies. Times do not show this, because all files of an unpacked archive have the same
    time. Snakemake's own records know the parameters of a job, but no archive holds them.
    """

    def look(wildcards):
        made = getattr(rules, rule)
        forced = workflow.dag.forcefiles
        if forced.isdisjoint(made.output) and (why := WHY_STALE.get(rule, why_document_stale)(rule, made)):
            logger.info(f"{why}: {rule} runs again.")
            forced.update(made.output)
        return []

    return look


def why_document_stale(rule, made):
    """Why the documents of a rule must be made again, as text; empty if they are good."""
    documents = [Path(output) for output in made.output if Path(output).exists()]
    digest = config_digest(rule) if rule in ASKED else None
    return next(filter(None, (why_stale(document, digest) for document in documents)), "")


def why_model_stale(rule, made):
    """As `why_document_stale`, or which file of the snapshot differs from the manifest."""
    why = why_document_stale(rule, made)
    if why or config["model"]["source"] == "hub":
        return why
    return why_other_snapshot(Path(made.output.manifest), Path(config["model"]["path"]))


def why_samples_stale(rule, made):
    """As `why_document_stale`, or that the files of a local calibration source have changed since the draw."""
    why = why_document_stale(rule, made)
    if why or config["calibration"]["source"] != "local":
        return why
    path = Path(config["calibration"]["path"])
    try:
        return why_other_samples(Path(made.output.calibration_manifest), path)
    except ModuleNotFoundError as error:  # Parquet files and folders of images take a library
        logger.warning(f"{path} is not compared with the samples drawn from it: this Python has no {error.name}.")
        return ""


def why_plan_stale(rule, made):
    """As `why_document_stale`, or which file of a local checkpoint differs from the plan."""
    return why_document_stale(rule, made) or why_other_checkpoint(Path(made.output.plan))


def why_copy_stale(rule, made):
    """Which published copy differs from the report, as text; empty if none does."""
    pairs = [(made.input.json, made.output.into_json), (made.input.markdown, made.output.into_markdown)]
    for source, target in pairs:
        if Path(source).exists() and Path(target).exists() and not filecmp.cmp(source, target, shallow=False):
            return f"{target} is of another report than {source}"
    return ""


def why_archive_stale(rule, made):
    """Which file an archive lacks, or holds with other content than the file has now."""
    return why_outdated(Path(made.output.checksums), [Path(path) for path in made.input if not callable(path)])


WHY_STALE = {
    "get_model": why_model_stale,
    "extract_calibration": why_samples_stale,
    "plan_quantization": why_plan_stale,
    "publish_summary": why_copy_stale,
    "archive_results": why_archive_stale,
}


def code_digest(script, *extra):
    """The digest of a script, of the library's code that it imports, and of files and folders that the code reads.

    Content counts, not time: a fresh clone reruns nothing. A comment or a docstring reruns nothing either.
    """
    try:
        return digest_of_code(ROOT, script, *extra)
    except InputError as error:
        sys.exit(redacted(str(error)))


def installed_version(package):
    """The version of a package in this Python, without the build (+cpu); None if it is not installed.

    A build belongs to the machine on which a job runs, and the one that plans may have another. The score store has
    the build of that job's torch in its keys, so no score of another build is taken.
    """
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


MISSING = [package for package in (*MEASURING, *DRAWING) if installed_version(package) is None]
if MISSING:
    logger.warning(
        f"This Python has no {', '.join(MISSING)}. It can plan a run, and takes the versions of envs/requirements.lock."
    )
LOCKED = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / "envs/requirements.lock").read_text(), re.MULTILINE))


def versions_of(*packages):
    """The versions of packages that a rule's output depends on: those with which its job runs.

    Jobs run in this Python, or in an image of the lock. A Python that lacks a package runs no jobs, and takes those of
    the lock too: `make setup` installs these. If results were made with others, a plan without the packages says that
    the params have changed, and shows both versions.
    """
    of_lock = MISSING or in_containers(workflow)
    found = LOCKED if of_lock else {package: installed_version(package) for package in packages}
    return " ".join(f"{package}={found[package]}" for package in packages)


# The params of a rule that replays the model.
REPLAYED = dict(versions=versions_of(*MEASURING), device=DEVICE, flags=replay_flags())
