"""The workflow as a user meets it: one run makes everything, and after a change only stale steps run again.

One copy of the checkout runs end to end on a tiny model; after that every test is a dry run on that copy.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from loopback_hub import serving, write_captions

from auto_quantize_model.code import code_digest
from auto_quantize_model.commands import get_model
from auto_quantize_model.made import standin
from auto_quantize_model.made.shapes import SHAPES

ROOT = Path(__file__).parents[1]
EVERYTHING = {
    "get_model",
    "extract_calibration",
    "plan_quantization",
    "calibrate_scales",
    "capture_sensitivity",
    "audit_capture",
    "measure_frontier",
    "build_profiles",
    "explain_units",
    "export_profiles",
    "render_report",
    "draw_figures",
    "render_page",
    "publish_summary",
    "archive_results",
}
IN_PARTS = {"measure_probes", "measure_scores", "measure_heldout", "audit_part"}
FROM_PAGE = {"render_page", "archive_results"}
FROM_REPORT = FROM_PAGE | {"render_report", "draw_figures", "publish_summary"}
FROM_AUDIT = FROM_REPORT | {"audit_capture"}
FROM_WHY = FROM_REPORT | {"explain_units", "export_profiles"}
FROM_PROFILES = FROM_WHY | {"build_profiles"}
FROM_FRONTIER = FROM_PROFILES | {"measure_frontier"}
FROM_CAPTURE = FROM_AUDIT | FROM_FRONTIER | {"capture_sensitivity"}
FROM_SCALES = FROM_CAPTURE | {"calibrate_scales"}
FROM_PLAN = FROM_SCALES | {"plan_quantization"}
TINY = {
    "model": {"name": "tiny", "source": "local", "path": "resources/models/tiny"},
    "calibration": {
        "source": "local",
        "path": "resources/digits {set}/digits.jsonl",
        "num_samples": 2,
        "num_heldout": 1,
        "batch_size": 1,
        "heldout_batch_size": 1,
    },
    "sensitivity": {"confidence_batches": 1, "audit_ops": 2},
    "decide": {"heldout_batches": 1, "points": 3},
    "profiles": {"max_divergence": 100.0, "max_bits": 16.0},
}


def copy_checkout(destination: Path) -> Path:
    """Copy what a commit of the working tree would hold into a git repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, destination / name)
    subprocess.run(["git", "init", "--quiet"], cwd=destination, check=True)
    subprocess.run(["git", "add", "--all"], cwd=destination, check=True)
    return destination


def snakemake(directory: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    return subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def dry_run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Snakemake's dry run, in a fork of this process: imports and parsing take longer than the dry run itself."""
    from snakemake.cli import main

    parse_library()
    command = ["--dry-run", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        if not (child := os.fork()):
            status = 1
            try:
                os.chdir(directory)
                sys.stdout = sys.stderr = output
                main(command)
            except SystemExit as end:
                print(end.code if isinstance(end.code, str) else "", end="", file=output)
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                output.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        output.seek(0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(ended), output.read())


@functools.cache
def parse_library() -> None:
    """Parse the library once for all forks: `code_digest` remembers a file by its content."""
    for script in (ROOT / "scripts").glob("*.py"):
        code_digest(ROOT, f"scripts/{script.name}")


def planned(directory: Path, *arguments: str) -> set[str]:
    """The rules that a run would execute, by a dry run; without `all`, which runs nothing."""
    ended = dry_run(directory, *arguments)
    assert ended.returncode == 0, ended.stdout
    rules = set(re.findall(r"^(?:local)?rule (\w+):", ended.stdout, re.MULTILINE)) - {"all"}
    assert rules or "Nothing to be done" in ended.stdout, ended.stdout
    return rules


def write_config(directory: Path, changes: dict[str, Any]) -> None:
    """Write config/config.yaml: the default with the changes, block by block."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    for block, values in changes.items():
        config[block].update(values)
    (directory / "config" / "config.yaml").write_text(yaml.safe_dump(config))


def on_texts(directory: Path, schemes: list[str]) -> dict[str, Any]:
    """Write eight short texts, and return the changes of a config that measures a tiny model on them in schemes."""
    samples = directory / "resources" / "texts.jsonl"
    samples.write_text("".join(json.dumps({"prompt": f"Say {word}.", "answer": word}) + "\n" for word in "abcdefgh"))
    return {
        **TINY,
        "calibration": TINY["calibration"] | {"name": "texts", "path": "resources/texts.jsonl"},
        "sensitivity": TINY["sensitivity"] | {"schemes": schemes},
        "decide": TINY["decide"] | {"candidates": schemes},
    }


def write_samples(file: Path) -> None:
    """Write five digits as images, and the JSONL that names them."""
    from auto_quantize_model.data.digits import digit_samples

    file.parent.mkdir(parents=True)
    rows = []
    for number, sample in enumerate(digit_samples(range(5))):
        rows.append({"image": f"{number} {{a}} <b>.png", "prompt": sample.prompt, "answer": sample.answer})
        assert bool(sample.images)
        sample.images[0].save(file.parent / rows[-1]["image"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def changed(path: Path, text: str) -> Iterator[None]:
    """Replace a file's text for a while."""
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that nothing has run in."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the checkout in which the pipeline has run on a tiny model, and what that run printed."""
    from auto_quantize_model.made.digits import build_snapshot

    directory = copy_checkout(tmp_path_factory.mktemp("finished"))
    build_snapshot(directory / "resources" / "models" / "tiny", depth=1, hidden=32, seed=0)
    write_samples(directory / TINY["calibration"]["path"])
    write_config(directory, TINY)
    ended = snakemake(directory, "--cores", "1", "--resources", "gpu=1")
    assert ended.returncode == 0, ended.stdout
    return directory, ended.stdout


def test_a_bare_checkout_plans_every_rule(checkout: Path) -> None:
    assert planned(checkout) == EVERYTHING


def test_the_workflow_passes_snakemakes_own_linter_and_its_formatter(checkout: Path) -> None:
    ended = snakemake(checkout, "--lint")
    assert ended.returncode == 0, ended.stdout
    command = [str(Path(sys.executable).with_name("snakefmt")), "--check", "workflow"]
    formatted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert formatted.returncode == 0, formatted.stderr


def test_the_threads_of_the_config_reach_each_step_that_measures(checkout: Path) -> None:
    told = dry_run(checkout, "--printshellcmds", "--config", "sensitivity={threads: 3}").stdout
    steps = re.findall(r"exec python scripts/(\w+)\.py [^\n]* --threads 3 ", told)
    assert sorted(steps) == ["calibrate_scales", "capture_sensitivity", "explain_units", "measure_frontier"]


REPLAYING = ["calibrate_scales", "capture_sensitivity", "explain_units", "measure_frontier"]


def test_every_rule_states_what_it_asks_of_a_scheduler() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = re.findall(r"^rule (\w+):\n(.*?)^    shell:(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert {name for name, *_ in rules} == EVERYTHING | IN_PARTS | {"quantize_model"}
    for name, body, shell in rules:
        for stated in ("    threads: ", "        mem_mb=", "        runtime="):
            assert body.count(stated) == 1, (name, stated)
        assert body.count("**ONE_GPU") == ("--device" in shell), name


@pytest.mark.parametrize(("arguments", "device"), [((), "cuda"), (("--resources", "gpu=0"), "cpu")])
def test_results_have_the_name_of_the_device_that_was_asked_for_and_only_a_gpu_is_asked_of_a_scheduler(
    checkout: Path, arguments: tuple[str, ...], device: str
) -> None:
    told = dry_run(checkout, "--printshellcmds", "--config", "sensitivity={device: cuda}", *arguments).stdout
    steps = dict(re.findall(r"^rule (\w+):\n(.*?)^Shell command: ", told, re.MULTILINE | re.DOTALL))
    asked = sorted(name for name, body in steps.items() if "gpu=1, gpu_manufacturer=nvidia, scale=0" in body)
    assert asked == (REPLAYING if device == "cuda" else [])
    assert "gpu=" not in "".join(body for name, body in steps.items() if name not in asked)
    assert f"/capture_{device}.json" in told and told.count(f"--device {device} ") == len(REPLAYING)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_measures_has_the_tensors_of_the_scales_as_input_and_not_as_option(
    checkout: Path, parts: int
) -> None:
    settings = {"exact": "all", "parts": parts, "threads": 1}
    told = dry_run(checkout, "--printshellcmds", "--config", f"sensitivity={json.dumps(settings)}").stdout
    steps = re.findall(r"^rule (\w+):\n    input: (.*?)\n.*?^Shell command: (.*?)$", told, re.MULTILINE | re.DOTALL)
    measuring = {"capture_sensitivity", "audit_capture", "measure_frontier", "explain_units"}
    if parts > 1:
        measuring = measuring - {"capture_sensitivity", "audit_capture"} | IN_PARTS - {"measure_probes"}
    having = {rule for rule, inputs, _ in steps if "scales_cpu.safetensors" in inputs}
    assert having == measuring | {"archive_results", "all"}
    assert not any("--listed" in command for _, _, command in steps)


def test_a_copy_without_the_library_ends_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    told = dry_run(tmp_path).stdout.splitlines()
    assert told[-1].startswith(f"{tmp_path} has no src/auto_quantize_model. ")
    assert told[-1].endswith("start Snakemake in a git clone")


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_a_profile_keeps_what_the_default_profile_says_of_files_and_names_its_executor(profile: str) -> None:
    profiles = ROOT / "workflow" / "profiles"
    default = yaml.safe_load((profiles / "default" / "config.yaml").read_text())
    made = yaml.safe_load((profiles / profile / "config.yaml").read_text())
    assert made["executor"] == profile and made["max-threads"] and made["retries"]
    assert default.pop("resources") == {"gpu": 1}  # many nodes have a GPU each
    assert default.items() <= made.items() and "resources" not in made


def test_a_bad_config_ends_before_any_job_with_a_line_for_each_problem_and_no_traceback(
    checkout: Path, tmp_path: Path
) -> None:
    changes = {"sensitivity": {"confidense_batches": 2}, "calibration": {"source": "local", "path": "gone {a}.jsonl"}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changes))
    ended = dry_run(checkout, "--configfile", str(tmp_path / "bad.yaml"))
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert lines[-1] == "config: sensitivity.confidense_batches: no such key; did you mean confidence_batches?"
    assert len(lines) <= 3 and "Traceback" not in ended.stdout
    ended = dry_run(checkout, "--config", "calibration={source: local, path: gone.jsonl}")
    expected = "config: calibration.path: gone.jsonl does not exist; give a JSONL, a Parquet file or an image folder"
    assert ended.returncode == 1 and ended.stdout.splitlines()[-1] == expected
    assert not (checkout / "results" / "digits_vlm").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_missing_ends_a_run_before_its_first_job(checkout: Path) -> None:
    ended = snakemake(checkout, "--cores", "1", "--config", "sensitivity={device: cuda}")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith("config: sensitivity.device: cuda, and this build of torch (")
    assert "Traceback" not in ended.stdout and not (checkout / "results" / "digits_vlm").exists()


def test_values_of_the_command_line_are_what_their_keys_take(checkout: Path) -> None:
    text = json.dumps({"num_samples": 34, "prompt": "what: {this}?", "columns": {"id": None}})
    ended = dry_run(checkout, "--config", f"calibration={text}")
    assert ended.returncode == 0, ended.stdout
    assert '"num_samples": 34' in ended.stdout and '"prompt": "what: {this}?"' in ended.stdout
    assert '"id": null' in ended.stdout


@pytest.mark.parametrize(
    "names",
    [
        ["qwen2_5_vl_3b"],
        ["qwen2_5_vl_3b", "standin"],
        ["qwen2_5_vl_3b", "qwen2_5_vl_7b"],
        ["qwen2_5_0_5b"],
        ["smollm2_135m"],
    ],
)
def test_every_shipped_config_plans_every_rule(checkout: Path, names: list[str]) -> None:
    photos = checkout / "resources" / "photos" / "photos.jsonl"
    photos.parent.mkdir(parents=True, exist_ok=True)
    photos.touch()
    (checkout / "resources" / "models" / "qwen2_5_vl_3b_standin").mkdir(parents=True, exist_ok=True)
    files = [f"config/{name}.yaml" for name in names]
    assert planned(checkout, "--configfile", *files) == EVERYTHING


def test_the_shipped_snapshot_counts_by_its_content_and_not_by_its_times(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, target = Path("resources/models/digits_vlm"), "results/digits_vlm/model_manifest.json"
    printed = dry_run(checkout, "--printshellcmds", target).stdout
    found = re.search(r"python scripts/get_model\.py (.*) --log ", printed)
    assert found, printed
    command = found[1].split()
    monkeypatch.chdir(checkout)
    assert get_model.main(command) == 0
    for path in snapshot.iterdir():
        path.touch()
    assert planned(checkout, target) == set()
    with changed(snapshot / "generation_config.json", "{}"):
        assert planned(checkout, target) == {"get_model"}
        assert get_model.main(command) == 2
    shutil.rmtree("results/digits_vlm")


# Of files of the library, the rules that use them, as their own code and not by way of other rules.
MEASURING = {"plan_quantization", "calibrate_scales", "capture_sensitivity", "audit_capture", "measure_frontier"}
MEASURING |= {"explain_units", "quantize_model"}
USERS = {
    "archive.py": {"archive_results"},
    "report/page.py": {"render_page"},
    "report/templates/op_sensitivity.html.j2": {"render_page"},
    "report/allocate.js": {"render_page"},
    "report/page.js": {"render_page"},
    "report/page.css": {"render_page"},
    "report/figures.py": {"render_page", "draw_figures"},
    "report/document.py": {"render_report"},
    "report/templates/op_sensitivity.md.j2": {"render_report"},
    "report/schema.json": {"render_report"},
    "export/exports.py": {"export_profiles"},
    "export/templates/inc_quantize.py.j2": {"export_profiles"},
    "decide/profiles.py": {"build_profiles", "measure_frontier"},
    "inc/audit.py": {"audit_capture", "quantize_model"},
    "measure/served_audit.py": {"audit_capture", "quantize_model"},
    "schemes/compressed.py": MEASURING | {"export_profiles"},
    "measure/heldout.py": {"measure_frontier", "quantize_model"},
    "inc/plan.py": MEASURING - {"calibrate_scales", "measure_frontier", "explain_units"},
    "measure/store.py": MEASURING - {"plan_quantization", "calibrate_scales"},
    "decide/causes.py": {"explain_units"},
    "schemes/cures.py": {"explain_units", "export_profiles", "quantize_model"},
    "report/explanations.py": {"render_report", "render_page", "export_profiles", "quantize_model"},
    "models/snapshot.py": MEASURING | {"get_model", "extract_calibration", "export_profiles"},
    "cli.py": EVERYTHING | {"quantize_model"},
    "api.py": set(),  # the package hands it out lazily, and no command uses it
}


def test_a_rules_digest_follows_the_files_that_the_rule_uses_and_no_others(checkout: Path) -> None:
    before = digests(checkout)
    assert set(before) == EVERYTHING | {"quantize_model"}
    for name, users in USERS.items():
        path = checkout / "src" / "auto_quantize_model" / name
        with changed(path, path.read_text() + "\nchanged = 1\n"):
            after = digests(checkout)
        assert {rule for rule in before if after[rule] != before[rule]} == users, name


def digests(directory: Path) -> dict[str, str]:
    """Each rule's digest of its code, by what the rules of a run by one job ask for."""
    paths = [path for path in (directory / "workflow" / "rules").glob("*.smk") if not path.stem.endswith("in_parts")]
    text = "".join(path.read_text() for path in paths)
    found = re.findall(r"^rule (\w+):.*?code_digest(\(.*?\)),$", text, re.M | re.S)
    asked = {rule: ast.literal_eval(names) for rule, names in found}
    return {
        rule: code_digest(directory, *([names] if isinstance(names, str) else names)) for rule, names in asked.items()
    }


def test_make_passes_a_config_on_and_refuses_one_that_is_not_there() -> None:
    command = ["make", "run", "READY=", "CONFIG=config/gone.yaml"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode and ended.stderr.startswith("error: CONFIG=config/gone.yaml: no such file; ")
    for words, expected in (
        (["run", "CONFIG=config/standin.yaml"], "--resources gpu=1 --configfile config/standin.yaml"),
        (["run", "VERBOSE=1"], "done; .venv/bin/snakemake --cores 1 --resources gpu=1"),
        (
            ["quantize", "PROFILE=safest"],
            "PIPELINE_QUIET=1 .venv/bin/snakemake quantize_model --cores 1 --resources gpu=1",
        ),
    ):
        shown = subprocess.run(["make", "-n", *words, "READY="], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in " ".join(shown.stdout.replace("\\\n", " ").split())


@pytest.mark.slow
def test_one_run_makes_the_report_the_summary_and_the_archive(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    report = directory / "results" / "tiny" / "digits" / "op_sensitivity_mse_v2_cpu"
    summary = directory / "context" / "summaries" / "inc-kb" / "tiny_mse_sensitivity"
    for suffix in (".md", ".json"):
        assert report.with_suffix(suffix).read_bytes() == summary.with_suffix(suffix).read_bytes()
    assert report.with_suffix(".html").is_file()
    assert len(list((report.parent / "figures_cpu").iterdir())) == 8
    ranking, frontier = (
        pd.read_csv(report.parent / "tables_cpu" / f"{name}.csv", float_precision="round_trip")
        for name in ("ranking", "frontier")
    )
    rows = json.loads(report.with_suffix(".json").read_text())["maps"]["isolated"]["ops"]
    assert ranking["mse_value"].to_list() == [row["mse_value"] for row in rows]
    assert {"frontier", "uniform", "random"} <= set(frontier["kind"])
    exports = json.loads((report.parent / "exports_cpu" / "index.json").read_text())["profiles"]
    assert {"smallest", "safest"} <= set(exports)
    for tool in (tool for tools in exports.values() for tool in tools.values()):
        assert bool(tool["files"]) != bool(tool["refused"])
        assert all((report.parent / file).is_file() for file in tool["files"])
    assert f"{len(EVERYTHING) + 1} of {len(EVERYTHING) + 1} steps (100%) done" in printed
    *_, decision, page, step = printed.splitlines()
    assert decision.startswith("Decision: ") and step.startswith("Next: ")
    assert page == f"The page: {report.with_suffix('.html').relative_to(directory)}"
    assert not list(directory.rglob("nc_workspace"))
    for rule in EVERYTHING:
        assert len(list(directory.glob(f"results/**/logs/{rule}.log"))) == 1
        assert len(list(directory.glob(f"results/**/benchmarks/{rule}.tsv"))) == 1


@pytest.mark.slow
def test_weights_in_their_files_give_the_bytes_of_a_model_in_memory(tmp_path: Path) -> None:
    """Plan, capture, audit, frontier and cures of a BF16 snapshot, with a memory that FP32 does not fit into.

    The scores lie where the config says, as on a volume that outlives a pod.
    """
    from safetensors.torch import load_file, save_file

    from auto_quantize_model.made.tiny_text import write_tiny_text

    directory = copy_checkout(tmp_path / "checkout")
    weights = write_tiny_text("mistral", directory / "resources" / "models" / "tiny") / "model.safetensors"
    save_file({key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    changes = on_texts(directory, ["FP8_DYNAMIC"])
    changes["sensitivity"]["schemes"] = ["inc_int8", "FP8_DYNAMIC"]
    names = ("plan", "scales_cpu", "capture_cpu", "audit_cpu", "frontier_cpu", "why_cpu")
    files = [directory / "results" / "tiny" / "texts" / f"{name}.json" for name in names]
    found = []
    for memory in ("3500MiB", None):
        write_config(directory, changes | {"machine": {"memory": memory, "score_store": str(tmp_path / "scores")}})
        asked = [f"{file.relative_to(directory)}" for file in files]
        ended = snakemake(directory, *asked, "--cores", "1", "--resources", "gpu=1")
        assert ended.returncode == 0, ended.stdout
        assert ("--memory 3670" in ended.stdout) == (memory is not None)
        found.append([file.read_bytes() for file in files])
        assert list((tmp_path / "scores").glob("*.jsonl")) and not (directory / "results" / "scores").exists()
        shutil.rmtree(tmp_path / "scores")
        write_config(directory, changes | {"machine": {"memory": "20GiB"}})
        ended = snakemake(directory, *asked, "--cores", "1", "-n")
        assert "Nothing to be done" in ended.stdout  # results do not depend on the limit
        shutil.rmtree(directory / "results")
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_archive_holds_the_results_with_their_checksums(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    checksums = json.loads((directory / "results/archives/tiny-digits.tar.sha256.json").read_text())
    with tarfile.open(directory / "results/archives/tiny-digits.tar") as tar:
        assert tar.getnames() == [entry["name"] for entry in checksums["files"]]
    assert "results/tiny/digits/op_sensitivity_mse_v2_cpu.json" in [entry["name"] for entry in checksums["files"]]


@dataclass(frozen=True)
class FromHub:
    """A checkout with the shipped config of the 3B, and a hub on loopback that is served at each run.

    Only ids and sizes are overridden: the hub has a tiny model in the published layout.
    """

    directory: Path
    arguments: tuple[str, ...]
    repositories: dict[tuple[str, str, str], Path]

    def run(self, *targets: str) -> None:
        with serving() as hub:
            hub.repositories.update(self.repositories)
            settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(self.directory / "home")}
            ended = snakemake(
                self.directory, *targets, "--cores", "1", "--resources", "gpu=1", *self.arguments, **settings
            )
        assert ended.returncode == 0, ended.stdout


@pytest.fixture
def from_hub(tmp_path: Path) -> FromHub:
    model, data = "a" * 40, "b" * 40
    standin.build(SHAPES["tiny"], tmp_path / "model", shard_bytes=100_000)
    overrides = [
        f"model={{repo_id: org/tiny, revision: {model}}}",
        f"calibration={{repo_id: org/captions, revision: {data}, num_samples: 2, num_heldout: 1}}",
        "sensitivity={audit_ops: 2}",
        "decide={heldout_batches: 1, points: 3}",
    ]
    repositories = {
        ("model", "org/tiny", model): tmp_path / "model",
        ("dataset", "org/captions", data): write_captions(tmp_path / "captions"),
    }
    directory = copy_checkout(tmp_path / "checkout")
    return FromHub(directory, ("--configfile", "config/qwen2_5_vl_3b.yaml", "--config", *overrides), repositories)


@pytest.mark.slow
def test_the_shipped_config_of_the_3b_is_planned_from_the_hub(from_hub: FromHub) -> None:
    from_hub.run("plan_quantization")
    results = from_hub.directory / "results" / "qwen2_5_vl_3b"
    model = json.loads((results / "model_manifest.json").read_text())
    assert model["source"] == "hub" and "drawn from seed 0" in model["stand_in"]
    (calibration,) = (json.loads(path.read_text()) for path in results.rglob("calibration_manifest.json"))
    assert calibration["source"] == "hub"
    assert all(sample["image_tokens"] > 0 for sample in calibration["samples"]["calibration"])
    (plan,) = (json.loads(path.read_text()) for path in results.rglob("plan.json"))
    assert (len(plan["ops"]), plan["maps"]) == (29, ["isolated", "fallback"])
    assert all(op["executions"] == [1, 1] for op in plan["ops"])
    # The hub is gone; what it gave is kept.
    assert planned(from_hub.directory, *from_hub.arguments) == FROM_SCALES


@pytest.mark.slow
@pytest.mark.bench
def test_the_shipped_config_of_the_3b_runs_from_the_hub_to_the_published_summary(from_hub: FromHub) -> None:
    from_hub.run()
    summary = from_hub.directory / "context" / "summaries" / "inc-kb" / "qwen2_5_vl_3b_mse_sensitivity"
    report = json.loads(summary.with_suffix(".json").read_text())
    assert (report["model"]["source"], report["calibration"]["source"]) == ("hub", "hub")
    assert (len(report["ops"]), len(report["batches"]), set(report["maps"])) == (29, 2, {"isolated", "fallback"})
    assert {op["status"] for op in report["ops"]} == {"measured"}
    assert all(batch["image_tokens"] > 0 for batch in report["batches"])
    assert report["audit"]["status"] == "bit_identical"
    markdown = summary.with_suffix(".md").read_text()
    assert markdown.startswith("# INT8 sensitivity of qwen2_5_vl_3b (stand-in)\n")
    assert "> **Warning:** This is a stand-in for a published model: its weights are drawn from seed 0" in markdown
    assert planned(from_hub.directory, *from_hub.arguments) == set()


@pytest.mark.slow
def test_snakemakes_report_carries_pictures_and_tables_with_captions(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    ended = snakemake(finished[0], "--report", str(tmp_path / "report.zip"))
    assert ended.returncode == 0 and "ERROR" not in ended.stdout, ended.stdout
    with zipfile.ZipFile(tmp_path / "report.zip") as packed:
        page = packed.read("report/report.html").decode()
        names = {Path(name).name for name in packed.namelist()}
    pictures = {"heat_map.svg", "ranked_ops.svg", "frontier.svg", "modalities.svg"}
    assert names >= pictures | {f"op_sensitivity_mse_v2_cpu{suffix}" for suffix in (".html", ".md")}
    assert names >= {"ranking.csv", "frontier.csv", "profiles.csv"}
    for text in (
        "Pictures",
        "Tables",
        "Dark is sensitive. Grey has no value",
        "Neural Compressor itself measures a sample of ops again",
        "A row is one choice of schemes",
    ):
        assert text in page


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_shows_the_decision_again(finished: tuple[Path, str]) -> None:
    assert planned(finished[0]) == set()
    ended = snakemake(finished[0], "--cores", "1", PIPELINE_QUIET="1")
    lines = [line for line in ended.stdout.splitlines() if not line.startswith(("Using workflow", "warning: "))]
    assert lines == finished[1].splitlines()[-3:]


@pytest.mark.slow
def test_a_comment_in_every_file_reruns_nothing_and_a_moved_module_reruns_what_uses_it(
    finished: tuple[Path, str],
) -> None:
    directory = finished[0]
    old, new = (directory / "src" / "auto_quantize_model" / name for name in ("export/exports.py", "moved.py"))
    script = directory / "scripts" / "export_profiles.py"
    with contextlib.ExitStack() as files:
        for path in [*(directory / "scripts").glob("*.py"), *(directory / "src").rglob("*.py")]:
            files.enter_context(changed(path, f"# A comment.\n{path.read_text()}"))
        files.enter_context(changed(script, script.read_text().replace(".export.exports", ".moved")))
        old.rename(new)
        files.callback(new.rename, old)
        assert planned(directory) == FROM_PAGE | {"export_profiles"}


@pytest.mark.slow
def test_a_profile_becomes_a_checkpoint_that_has_the_error_that_it_promised(finished: tuple[Path, str]) -> None:
    arguments = ("quantize_model", "--cores", "1", "--resources", "gpu=1", "--config", "quantize={profile: smallest}")
    assert planned(finished[0], *arguments) == {"quantize_model"}
    ended = snakemake(finished[0], *arguments)
    assert ended.returncode == 0, ended.stdout
    made = finished[0] / "results" / "tiny" / "digits" / "quantized_cpu" / "smallest"
    record = json.loads((made / "quantized.json").read_text())
    assert record["status"] == "bit_identical" and record["found"] == record["promised"]
    assert (made / "model.safetensors").stat().st_size and (made / "README.md").is_file()
    assert planned(finished[0]) == set()


@pytest.mark.slow
def test_changed_confidence_batches_rerun_plan_capture_and_what_follows(finished: tuple[Path, str]) -> None:
    config = finished[0] / "config" / "config.yaml"
    text = config.read_text()
    with changed(config, text.replace("confidence_batches: 1", "confidence_batches: 2")):
        assert config.read_text() != text
        assert planned(finished[0]) == FROM_PLAN


@pytest.mark.slow
def test_changed_audit_ops_rerun_the_audit_and_what_follows(finished: tuple[Path, str]) -> None:
    config = finished[0] / "config" / "config.yaml"
    text = config.read_text()
    with changed(config, text.replace("audit_ops: 2", "audit_ops: 3")):
        assert config.read_text() != text
        assert planned(finished[0]) == FROM_AUDIT


@pytest.mark.slow
def test_a_gpu_that_is_asked_for_names_other_results_and_none_means_the_cpu(finished: tuple[Path, str]) -> None:
    config = finished[0] / "config" / "config.yaml"
    with changed(config, config.read_text().replace("device: cpu", "device: cuda")):
        assert planned(finished[0], "--resources", "gpu=1") == FROM_SCALES
        assert planned(finished[0], "--resources", "gpu=0") == set()


@pytest.mark.slow
def test_a_killed_capture_resumes_and_ends_in_the_same_bytes(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory = finished[0]
    results = directory / "results" / "tiny" / "digits"
    command = [sys.executable, "scripts/capture_sensitivity.py", "--device", "cpu"]
    for option, path in (
        ("--manifest", directory / "results" / "tiny" / "model_manifest.json"),
        ("--calibration-manifest", results / "calibration_manifest.json"),
        ("--calibration-set", results / "calibration" / "calibration.parquet"),
        ("--plan", results / "plan.json"),
        ("--scales", results / "scales_cpu.json"),
        ("--score-store", tmp_path / "scores"),
        ("--capture", tmp_path / "capture.json"),
        ("--run-record", tmp_path / "run.json"),
    ):
        command += [option, str(path)]
    captured = json.loads((results / "capture_cpu.json").read_text())
    command += ["--config-digest", captured["document"]["made_from"]["config"], "--candidates", *captured["candidates"]]
    # One thread, as Snakemake gave the run that it is compared with.
    environment = os.environ | {"PYTHONPATH": str(directory / "src"), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.DEVNULL)

    def scores() -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("scores/*.jsonl"))

    while killed.poll() is None and scores() <= 10:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0
    assert not (tmp_path / "capture.json").exists()
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = re.search(r"capture: (\d+) results came from the store", ended.stdout)
    assert found and int(found[1]) >= 9
    assert (tmp_path / "capture.json").read_bytes() == (results / "capture_cpu.json").read_bytes()


@pytest.mark.slow
def test_capture_audit_and_frontier_in_parts_have_the_same_bytes(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    results = directory / "results" / "tiny" / "digits"
    made = [results / f"{name}_cpu.json" for name in ("capture", "audit", "frontier")]
    expected = [path.read_bytes() for path in made]
    asked = ["--config", "sensitivity={parts: 2}"]
    assert planned(directory, *asked) == FROM_CAPTURE | IN_PARTS
    for path in made:
        path.unlink()
    targets = [str(path.relative_to(directory)) for path in made]
    ended = snakemake(directory, "--cores", "1", "--resources", "gpu=1", *asked, "--", *targets)
    assert ended.returncode == 0, ended.stdout
    assert [path.read_bytes() for path in made] == expected
    parts = {path.name for path in results.glob("parts_cpu/*_2/*_?.json")}
    assert parts == {f"{kind}_{number}.json" for kind in ("probes", "scores", "heldout", "audit") for number in (1, 2)}


@pytest.mark.slow
def test_no_capture_outlives_a_killed_snakemake(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--forcerun", "capture_sensitivity"]
    running = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    captures = wait_for(lambda: captures_in(directory), 120)
    running.kill()
    running.wait()
    assert captures
    assert wait_for(lambda: not captures_in(directory), 60)
    # Snakemake removed it before the job, and a capture that had gone on would have written it.
    assert not (directory / "results" / "tiny" / "digits" / "capture_cpu.json").exists()


INTERRUPTED = f"""
import os
os.environ.update(PIPELINE_PID=str(os.getpid()), PYTHONPATH="{ROOT}/src")
include: "{ROOT}/workflow/rules/signals.smk"
onstart:
    stop_jobs_on_signals()
rule all:
    input: "b.json"
rule a:
    output: "a.json"
    log: "a.log"
    shell: "exec {sys.executable} a.py"
rule b:
    input: "a.json"
    output: "b.json"
    shell: "cp {{input}} {{output}}"
"""
LONG_JOB = """
import time
from pathlib import Path
from auto_quantize_model import cli
from auto_quantize_model.files import atomic_path
def work():
    with atomic_path(Path("a.json")) as temporary:
        temporary.write_text("{}")
        if not Path("begun").exists():
            Path("begun").touch()
            time.sleep(600)
raise SystemExit(cli.run(work, Path("a.log")))
"""


@pytest.fixture
def long_job(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Snakemake with a job that does not end by itself."""
    (tmp_path / "Snakefile").write_text(INTERRUPTED)
    (tmp_path / "a.py").write_text(LONG_JOB)
    running = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A run in the background of a script has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert wait_for((tmp_path / "begun").exists, 60)
    yield running
    running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_snakemake_alone_ends_its_jobs_and_the_next_run_needs_no_unlock(
    long_job: subprocess.Popen[bytes], tmp_path: Path, name: str
) -> None:
    long_job.send_signal(getattr(signal, name))
    assert long_job.wait(60) == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"Snakefile", "a.py", "begun", "a.log", ".snakemake"}
    assert (tmp_path / "a.log").read_text() == "stopped by SIGTERM; run again to resume\n"
    ended = snakemake(tmp_path, "--cores", "1")
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "b.json").read_text() == "{}"


@pytest.mark.slow
def test_the_lock_of_a_living_snakemake_holds_and_that_of_a_killed_one_needs_no_unlock(
    long_job: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    refused = snakemake(tmp_path, "--cores", "1")
    assert refused.returncode == 1 and "LockException" in refused.stdout
    long_job.kill()
    long_job.wait()
    ended = snakemake(tmp_path, "--cores", "1")
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "b.json").read_text() == "{}"


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What `condition` returns once it is true, or in the end."""
    for _ in range(int(seconds * 10)):
        if found := condition():
            return found
        time.sleep(0.1)
    return condition()


def captures_in(directory: Path) -> list[str]:
    """The processes that capture in a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"scripts/capture_sensitivity.py" in words and (process / "cwd").resolve() == directory:
                found.append(process.name)
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_a_touched_file_and_a_reordered_config_rerun_nothing(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    for folder in ("src", "scripts", "resources"):
        for path in (directory / folder).rglob("*"):
            path.touch()
    config = directory / "config" / "config.yaml"
    reordered = yaml.safe_dump(dict(reversed(yaml.safe_load(config.read_text()).items())), sort_keys=False)
    with changed(config, reordered):
        assert planned(directory) == set()


@pytest.mark.slow
def test_a_fresh_clone_with_restored_results_reruns_nothing(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    clone = copy_checkout(tmp_path / "clone")
    write_config(clone, TINY)
    for name in ("results", "context", "resources", ".snakemake"):
        # Without the times, as a download or an unpacked archive of results might come.
        shutil.copytree(directory / name, clone / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    assert planned(clone) == set()


@pytest.fixture(scope="module")
def restored(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone with the archive of the results unpacked in it, the samples, and no records of Snakemake's."""
    clone = copy_checkout(tmp_path_factory.mktemp("restored"))
    write_config(clone, TINY)
    write_samples(clone / TINY["calibration"]["path"])
    with tarfile.open(finished[0] / "results/archives/tiny-digits.tar") as tar:
        tar.extractall(clone)  # noqa: S202  written by this test; `filter` needs Python 3.11.4
    return clone


@pytest.mark.slow
def test_an_unpacked_archive_reruns_no_measurement(restored: Path) -> None:
    assert planned(restored) == {"publish_summary", "archive_results"}


@pytest.mark.slow
def test_with_an_unpacked_archive_other_samples_are_drawn_again_and_missing_ones_are_not_asked_for(
    restored: Path,
) -> None:
    samples = restored / TINY["calibration"]["path"]
    image = samples.with_name("4 {a} <b>.png")
    with away(image):
        shutil.copy(samples.with_name("0 {a} <b>.png"), image)
        assert planned(restored) == EVERYTHING - {"get_model"}
    with changed(samples, samples.read_text() + "\n"):
        assert planned(restored) == EVERYTHING - {"get_model"}
    with away(samples):
        assert planned(restored) == {"publish_summary", "archive_results"}
        ended = dry_run(restored, "--config", "calibration={seed: 1}")
        line = f"config: calibration.path: {TINY['calibration']['path']} does not exist; give a JSONL,"
        assert ended.returncode == 1 and ended.stdout.splitlines()[-1].startswith(line), ended.stdout


@pytest.mark.slow
def test_another_file_of_a_local_source_reruns_the_rule_that_reads_it_and_what_follows(
    finished: tuple[Path, str],
) -> None:
    samples = finished[0] / TINY["calibration"]["path"]
    with away(samples.with_name("4 {a} <b>.png")):
        assert planned(finished[0]) == EVERYTHING - {"get_model"}
    tokenizer = finished[0] / "resources/models/tiny/tokenizer_config.json"
    with changed(tokenizer, tokenizer.read_text() + "\n"):
        assert planned(finished[0]) == EVERYTHING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"profiles": {"max_bits": 8.0}}, FROM_FRONTIER),
        ({"sensitivity": {"audit_ops": 3}}, FROM_AUDIT),
        ({"decide": {"points": 4}}, FROM_FRONTIER),
        ({"sensitivity": {"tf32": True}}, FROM_SCALES),
        ({"sensitivity": {"confidence_batches": 2}}, FROM_PLAN),
        ({"calibration": {"seed": 1}}, EVERYTHING - {"get_model"}),
        ({"model": {"path": "resources/models/other"}}, EVERYTHING),
    ],
)
def test_an_unpacked_archive_of_another_config_is_measured_again_from_where_they_differ(
    restored: Path, changes: dict[str, Any], stale: set[str]
) -> None:
    config = restored / "config" / "config.yaml"
    with changed(config, config.read_text()):
        write_config(restored, {name: TINY.get(name, {}) | changes.get(name, {}) for name in {*TINY, *changes}})
        assert planned(restored) == stale


@pytest.mark.slow
def test_of_an_unpacked_archive_of_another_config_a_target_makes_what_it_needs_and_no_more(restored: Path) -> None:
    batches = ("--config", "sensitivity={confidence_batches: 2, audit_ops: 3}")
    assert planned(restored, "results/tiny/digits/plan.json", *batches) == {"plan_quantization"}
    assert planned(restored, "quantize_model", *batches) == (FROM_PLAN - FROM_AUDIT) | {"quantize_model"}


@contextlib.contextmanager
def away(path: Path) -> Iterator[None]:
    """Take a file away for a while."""
    elsewhere = path.parents[3] / f"{path.name}.away"
    path.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("op_sensitivity_mse_v2_cpu.html", FROM_PAGE),
        ("op_sensitivity_mse_v2_cpu.md", FROM_REPORT),
        ("op_sensitivity_mse_v2_cpu.json", FROM_REPORT),
        ("tables_cpu/profiles.csv", FROM_REPORT),
        ("figures_cpu/heat_map.png", FROM_PAGE | {"draw_figures"}),
        ("figures_cpu/frontier.svg", FROM_PAGE | {"draw_figures"}),
        ("exports_cpu/smallest/llm_compressor_recipe.yaml", FROM_PAGE | {"export_profiles"}),
        ("exports_cpu/index.json", FROM_PAGE | {"export_profiles"}),
        ("why_cpu.json", FROM_WHY),
        ("profiles_cpu.json", FROM_PROFILES),
        ("scales_cpu.safetensors", FROM_SCALES),
        ("audit_cpu.json", FROM_AUDIT),
        ("../../archives/tiny-digits.tar", {"archive_results"}),
        ("../../archives/tiny-digits.tar.sha256.json", {"archive_results"}),
        ("../../../context/summaries/inc-kb/tiny_mse_sensitivity.md", {"publish_summary"}),
    ],
)
def test_a_deleted_file_that_a_user_is_told_of_is_made_again(
    finished: tuple[Path, str], name: str, stale: set[str]
) -> None:
    with away((finished[0] / "results" / "tiny" / "digits" / name).resolve()):
        assert planned(finished[0]) == stale


@pytest.mark.slow
def test_a_users_file_among_the_exports_outlives_a_run_that_would_replace_them(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Neither the script nor Snakemake removes it: Snakemake empties a folder that is an output."""
    directory = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    exports = directory / "results/tiny/digits/exports_cpu"
    (exports / "mine.txt").write_text("mine")
    (exports / "smallest" / "llm_compressor_recipe.yaml").unlink()
    ended = snakemake(directory, "export_profiles", "--cores", "1", "--resources", "gpu=1")
    assert ended.returncode != 0
    assert "the folder is not replaced, because mine.txt in it was not written by this tool" in ended.stdout
    assert (exports / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_copy_or_an_archive_of_other_results_is_made_again(finished: tuple[Path, str]) -> None:
    """As where an archive is unpacked over the results of another run: by their times nothing would be stale."""
    summary = finished[0] / "context/summaries/inc-kb/tiny_mse_sensitivity.json"
    with changed(summary, summary.read_text().replace('"seed": 0', '"seed": 1')):
        assert planned(finished[0]) == {"publish_summary"}
    checksums = finished[0] / "results/archives/tiny-digits.tar.sha256.json"
    table = finished[0] / "results/tiny/digits/tables_cpu/ranking.csv"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    with changed(checksums, checksums.read_text().replace(digest, "0" * 64)):
        assert planned(finished[0]) == {"archive_results"}
    # Model a-b with set c, and model a with set b-c, have archives of one name.
    with changed(checksums, checksums.read_text().replace("results/tiny/digits/", "results/other/set/")):
        assert planned(finished[0]) == {"archive_results"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("op_sensitivity_mse_v2_cpu.json", "{}", "render_report"),
        ("profiles_cpu.json", "[]", "build_profiles"),
        ("plan.json", '{"ops": []}', "plan_quantization"),
    ],
)
def test_a_document_edited_by_hand_ends_the_run_with_its_name_and_the_next_step(
    finished: tuple[Path, str], tmp_path: Path, name: str, text: str, rule: str
) -> None:
    directory = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    before = (directory / "context/summaries/inc-kb/tiny_mse_sensitivity.json").read_bytes()
    (directory / "results/tiny/digits" / name).write_text(text)
    ended = snakemake(directory, "--cores", "1", "--resources", "gpu=1", PIPELINE_QUIET="1")
    assert ended.returncode != 0
    assert "Traceback" not in ended.stdout and "exec python" not in ended.stdout
    *_, where, last = ended.stdout.splitlines()
    assert " failed; its log: results/tiny/digits/logs/" in where
    errors = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
    assert (
        errors
        and errors[-1] == last
        and all(line.startswith(f"error: results/tiny/digits/{name}: no ") for line in errors)
    ), ended.stdout
    assert all(f"(snakemake --cores 1 --forcerun {rule})" in line for line in errors)
    published = directory / "context/summaries/inc-kb/tiny_mse_sensitivity.json"
    assert not published.exists() or published.read_bytes() == before


@pytest.mark.slow
def test_snakemake_archive_packs_the_workflow_with_its_code(finished: tuple[Path, str], tmp_path: Path) -> None:
    packed = tmp_path / "workflow.tar.gz"
    ended = snakemake(finished[0], "--archive", str(packed))
    assert ended.returncode == 0, ended.stdout
    with tarfile.open(packed) as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
    for name in ("workflow/Snakefile", "workflow/rules/common.smk", "config/config.yaml", "scripts/get_model.py"):
        assert name in names
    assert "src/auto_quantize_model/archive.py" in names
    assert {"results/README.md", "resources/models/digits_vlm/model.safetensors"} <= names
    assert not any(name.startswith("resources/models/tiny") for name in names)


def test_the_rule_graph_of_the_readme_is_that_of_the_workflow_under_any_hash_seed(checkout: Path) -> None:
    page = checkout / "graph.md"
    page.write_text("before\n<!-- rulegraph:begin -->\nold\n<!-- rulegraph:end -->\nafter\n")
    command = [sys.executable, "scripts/draw_rule_graph.py", "--svg", "graph.svg", "--readme", "graph.md"]
    environment = os.environ | {"PYTHONHASHSEED": "2", "PYTHONPATH": str(checkout / "src")}
    ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    drawn = page.read_text()
    assert drawn.startswith("before\n<!-- rulegraph:begin -->\n```mermaid\n") and drawn.endswith("after\n")
    assert drawn.removeprefix("before\n").removesuffix("after\n") in (ROOT / "README.md").read_text()
    assert (checkout / "graph.svg").read_bytes() == (ROOT / "docs" / "rulegraph.svg").read_bytes()
    assert all(rule in drawn for rule in EVERYTHING)
