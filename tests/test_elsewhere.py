"""The workflow away from its checkout: planned by Snakemake alone, in any folder, and as a module.

One module runs end to end, from a checkout whose path has spaces and braces. All other tests are dry runs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_workflow import (
    EVERYTHING,
    FROM_PLAN,
    TINY,
    changed,
    copy_checkout,
    dry_run,
    on_texts,
    planned,
    snakemake,
    write_samples,
)

MODULE = """
configfile: "whole.yaml"
module aqm:
    snakefile: {snakefile!r}
    config: config["sensitivity_of_mine"]
use rule * from aqm as aqm_*
rule all:
    default_target: True
    input: rules.aqm_all.input, "own.txt"
rule own:
    output: "own.txt"
    shell: "touch {{output}}"
"""
# Snakemake, without the packages of the Python that runs this test.
ALONE = "import sys; sys.path.append({folder!r}); from snakemake.cli import main; main(sys.argv[1:])"
NOT_OF_SNAKEMAKE = ("torch", "transformers", "neural_compressor", "datasets", "pandas", "scipy", "numpy", "safetensors")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout whose path is not an ordinary one."""
    return copy_checkout(tmp_path_factory.mktemp("a b {c}") / "it's {here}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program that is Snakemake in a Python that has Snakemake's own dependencies, and no others."""
    folder = tmp_path_factory.mktemp("alone")
    for found in closure("snakemake"):
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (folder / top).symlink_to(Path(str(found.locate_file(top))))
    assert not [name for name in NOT_OF_SNAKEMAKE if (folder / name).exists()]
    return ALONE.format(folder=str(folder))


def closure(name: str) -> list[Distribution]:
    """An installed package and all that it requires, directly or by way of others."""
    found: dict[str, Distribution] = {}
    pending = {name}
    while pending:
        package = pending.pop()
        found[package] = distribution(package)
        needed = map(Requirement, found[package].requires or ())
        pending |= {
            canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})
        }
        pending -= set(found)
    return list(found.values())


def snakemake_alone(program: str, directory: Path, *arguments: str) -> str:
    """What Snakemake prints that runs without packages but its own."""
    command = [sys.executable, "-S", "-c", program, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run"], "This was a dry-run"),
        (["--lint"], "Congratulations, your workflow is in a good condition!"),
        (["--rulegraph"], "capture_sensitivity"),
        (["--summary"], "results/digits_vlm/digits/plan.json\t-\tplan_quantization\t-\tmissing"),
        (["--list-rules"], "measure_frontier"),
    ],
)
def test_snakemake_alone_plans(alone: str, checkout: Path, arguments: list[str], said: str) -> None:
    told = snakemake_alone(alone, checkout, *arguments)
    assert said in told
    assert "This Python has no neural-compressor, compressed-tensors, torch, transformers, numpy, altair" in told


def test_snakemake_alone_ends_a_run_before_its_first_job(alone: str, checkout: Path, tmp_path: Path) -> None:
    command = ["--cores", "1", "--snakefile", str(checkout / "workflow/Snakefile")]
    with pytest.raises(AssertionError, match=r"has no neural-compressor, .*so it can plan and not measure; install"):
        snakemake_alone(alone, tmp_path, *command)
    assert not (tmp_path / "results").exists()


def test_a_directory_elsewhere_takes_the_shipped_model_and_the_defaults_of_the_checkout(
    checkout: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "made"
    ended = dry_run(checkout, "--directory", str(directory), "--printshellcmds")
    assert ended.returncode == 0, ended.stdout
    assert f"exec python {quoted(checkout / 'scripts/get_model.py')} --name digits_vlm" in ended.stdout
    assert f" --path {quoted(checkout / 'resources/models/digits_vlm')} " in ended.stdout
    assert planned(checkout, "--directory", str(directory)) == EVERYTHING
    # A config there names the keys that differ, and one of the command line goes before it.
    (directory / "config").mkdir()
    (directory / "config/config.yaml").write_text("model: {name: there}\ncalibration: {num_samples: 34}\n")
    (tmp_path / "mine.yaml").write_text("model: {name: mine}\n")
    told = dry_run(checkout, "--directory", str(directory), "--configfile", str(tmp_path / "mine.yaml")).stdout
    assert "results/mine/digits/plan.json" in told and "results/there" not in told
    told = dry_run(checkout, "--directory", str(directory), "--printshellcmds").stdout
    assert "results/there/digits/plan.json" in told and '"num_samples": 34' in told


@pytest.mark.slow
def test_a_run_in_another_directory_makes_every_result_there_and_names_the_next_command(
    checkout: Path, tmp_path: Path
) -> None:
    from auto_quantize_model.made.tiny_text import write_tiny_text

    directory = tmp_path / "made there"
    (directory / "resources").mkdir(parents=True)
    write_tiny_text("mistral", directory / "resources/models/tiny")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(on_texts(directory, ["FP8_DYNAMIC"])))
    before = contents(checkout)
    asked = ["--snakefile", str(checkout / "workflow/Snakefile"), "--directory", str(directory)]
    config = ["--configfile", str(tmp_path / "mine.yaml")]
    ended = snakemake(tmp_path, *asked, *config, "--cores", "1", PYTHONDONTWRITEBYTECODE="1")
    assert ended.returncode == 0, ended.stdout
    assert contents(checkout) == before
    assert list(directory.glob("results/tiny/texts/*.html")) and not (tmp_path / "results").exists()
    last = ended.stdout.splitlines()[-1]
    command = shlex.split(last.removeprefix("Next: "))
    assert command[0] == "snakemake" and command[-1] == "quantize_model"
    told = snakemake(tmp_path, *command[1:-2], "--dry-run", *command[-2:]).stdout
    assert rules_of(told) == {"quantize_model"}


def quoted(path: Path) -> str:
    """A path as Snakemake quotes it for a shell."""
    return shlex.quote(str(path))


def test_a_relative_path_is_that_of_the_working_directory_and_else_that_of_the_checkout(
    checkout: Path, tmp_path: Path
) -> None:
    arguments = ("--snakefile", str(checkout / "workflow/Snakefile"), "--printshellcmds")
    shipped = ("--configfile", str(checkout / "config/smollm2_135m.yaml"))
    told = dry_run(tmp_path, *arguments, *shipped).stdout
    assert f'"path": "{checkout}/resources/texts/moby_dick.jsonl"'.replace("'", "'\"'\"'") in told
    assert " --path resources/models/smollm2_135m " in told  # made where the run lies
    own = tmp_path / "resources/texts/moby_dick.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("{}\n")
    assert '"path": "resources/texts/moby_dick.jsonl"' in dry_run(tmp_path, *arguments, *shipped).stdout
    ended = dry_run(tmp_path, *arguments, "--config", "calibration={source: local, path: gone.jsonl}")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith("config: calibration.path: gone.jsonl does not exist; give a JSONL")


def test_a_checkout_in_an_odd_path_plans_by_itself_and_passes_the_linter(checkout: Path) -> None:
    assert planned(checkout) == EVERYTHING
    ended = snakemake(checkout, "--lint")
    assert ended.returncode == 0, ended.stdout


def test_a_module_is_told_of_a_bad_config_in_one_line(checkout: Path, tmp_path: Path) -> None:
    write_module(tmp_path, checkout, {"model": {"nane": "x"}})
    ended = dry_run(tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1] == "config: model.nane: no such key; did you mean name?"
    assert "Traceback" not in ended.stdout


def test_a_module_with_a_prefix_keeps_its_results_below_it(checkout: Path, tmp_path: Path) -> None:
    write_module(tmp_path, checkout, {})
    snakefile = tmp_path / "Snakefile"
    snakefile.write_text(snakefile.read_text().replace("    config:", '    prefix: "below"\n    config:'))
    told = dry_run(tmp_path).stdout
    outputs = re.findall(r"^    output: (.*)", told, re.MULTILINE)
    assert len(outputs) == len(EVERYTHING) + 1
    assert all(path.startswith("below/") or path == "own.txt" for line in outputs for path in line.split(", "))


# As snakedeploy writes it for a repository on GitHub.
DEPLOYED = """
configfile: "config/config.yaml"
module auto_quantize_model:
    snakefile:
        github("org/auto-quantize-model", path="workflow/Snakefile", tag="v1")
    config:
        config
use rule * from auto_quantize_model
"""


def test_a_module_from_a_host_unpacks_the_commit_that_its_tag_names(checkout: Path, tmp_path: Path) -> None:
    origin = copy_checkout(tmp_path / "origin")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    for words in ([*author, "commit", "--quiet", "-m", "all"], ["tag", "v1"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    folder = tmp_path / "deployed"
    shutil.copytree(checkout / "config", folder / "config")
    (folder / "workflow").mkdir()
    (folder / "workflow/Snakefile").write_text(DEPLOYED)
    settings = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/org/auto-quantize-model",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "GITHUB_TOKEN": "",
    }
    ended = snakemake(folder, "--dry-run", "--printshellcmds", **settings)
    assert ended.returncode == 0, ended.stdout
    assert rules_of(ended.stdout) == EVERYTHING
    (unpacked,) = (folder / ".snakemake/auto-quantize").iterdir()
    assert f"exec python {unpacked}/scripts/get_model.py --name digits_vlm" in ended.stdout
    assert f" --path {unpacked}/resources/models/digits_vlm " in ended.stdout


def test_a_table_of_models_is_one_run_with_a_page_across_them(checkout: Path, tmp_path: Path) -> None:
    arguments = ("--snakefile", str(checkout / "workflow/models.smk"))
    told = dry_run(tmp_path, *arguments)
    assert told.returncode == 0, told.stdout
    names = ("digits_vlm", "smollm2_135m")
    assert rules_of(told.stdout) == {f"{name}_{rule}" for name in names for rule in EVERYTHING} | {"compare_models"}
    (tmp_path / "config").mkdir()
    (tmp_path / "config/models.tsv").write_text("model\tconfig\tcalibration\nmine\tgone.yaml\t\n")
    ended = dry_run(tmp_path, *arguments)
    assert ended.returncode == 1 and "Traceback" not in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("config/models.tsv: line 2: gone.yaml: No such file")
    linted = snakemake(checkout, "--lint", "--snakefile", "workflow/models.smk")
    assert linted.returncode == 0, linted.stdout


def write_module(folder: Path, checkout: Path, config: dict[str, object]) -> None:
    """Write a Snakefile with a rule of its own that uses the workflow of a checkout as a module."""
    (folder / "Snakefile").write_text(MODULE.format(snakefile=str(checkout / "workflow/Snakefile")))
    (folder / "whole.yaml").write_text(yaml.safe_dump({"other": 1, "sensitivity_of_mine": config}))


@pytest.fixture(scope="module")
def ran(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which another Snakefile ran the workflow as a module on a tiny model, and what that run printed."""
    from auto_quantize_model.made.digits import build_snapshot

    folder = tmp_path_factory.mktemp("module")
    build_snapshot(folder / TINY["model"]["path"], depth=1, hidden=32, seed=0)
    write_samples(folder / TINY["calibration"]["path"])
    write_module(folder, checkout, TINY)
    before = contents(checkout)
    ended = snakemake(folder, "--cores", "1", "--resources", "gpu=1", PYTHONDONTWRITEBYTECODE="1")
    assert ended.returncode == 0, ended.stdout
    assert contents(checkout) == before  # so the checkout may be read-only
    return folder, ended.stdout


def contents(checkout: Path) -> dict[Path, int]:
    """The files of a checkout with the times of their last change."""
    return {path: path.stat().st_mtime_ns for path in checkout.rglob("*") if "__pycache__" not in path.parts}


def rules_of(told: str) -> set[str]:
    """The rules that a dry run would run."""
    found = set(re.findall(r"^(?:local)?rule (\w+):", told, re.MULTILINE)) - {"all"}
    assert found or "Nothing to be done" in told, told
    return found


@pytest.mark.slow
def test_a_module_makes_every_result_in_the_folder_of_the_snakefile_that_uses_it(ran: tuple[Path, str]) -> None:
    folder, printed = ran
    assert rules_of(printed) == {f"aqm_{rule}" for rule in EVERYTHING} | {"own"}
    assert (folder / "own.txt").exists()
    assert (folder / "results/tiny/digits/op_sensitivity_mse_v2_cpu.html").is_file()
    assert (folder / "context/summaries/inc-kb/tiny_mse_sensitivity.json").is_file()
    assert rules_of(dry_run(folder).stdout) == set()


@pytest.mark.slow
def test_a_changed_config_of_a_module_reruns_what_depends_on_it(ran: tuple[Path, str]) -> None:
    config = ran[0] / "whole.yaml"
    with changed(config, config.read_text().replace("confidence_batches: 1", "confidence_batches: 2")):
        assert rules_of(dry_run(ran[0]).stdout) == {f"aqm_{rule}" for rule in FROM_PLAN}


@pytest.mark.slow
def test_snakemake_alone_finds_nothing_stale_in_what_a_whole_environment_made(
    ran: tuple[Path, str], alone: str
) -> None:
    assert rules_of(snakemake_alone(alone, ran[0], "--dry-run")) == set()


@pytest.mark.slow
def test_a_checkout_at_another_place_reruns_nothing(ran: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ran[0], tmp_path / "folder"))
    write_module(folder, copy_checkout(tmp_path / "other"), TINY)
    assert rules_of(dry_run(folder).stdout) == set()


@pytest.mark.slow
def test_other_versions_in_the_lock_are_said_where_snakemake_alone_plans(
    ran: tuple[Path, str], alone: str, checkout: Path
) -> None:
    lock = checkout / "envs/requirements.lock"
    with changed(lock, re.sub(r"^torch==.*", "torch==2.99.0", lock.read_text(), flags=re.MULTILINE)):
        told = snakemake_alone(alone, ran[0], "--dry-run")
        assert "torch=2.99.0" in told and "aqm_capture_sensitivity" in rules_of(told)
        assert rules_of(dry_run(ran[0]).stdout) == set()
