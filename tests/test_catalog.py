"""What the catalog of workflows, snakedeploy and CI take from the repository."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_workflow import EVERYTHING, planned

from auto_quantize_model.config_text import read_config

ROOT = Path(__file__).parents[1]
PIPELINES = sorted((ROOT / ".github/workflows").glob("*.yaml"))


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_package_changelog_and_citation_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert read_yaml("CITATION.cff")["version"] == version
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_the_catalog_finds_what_it_shows() -> None:
    usage = read_yaml(".snakemake-workflow-catalog.yml")["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["mandatory-flags"]["flags"] == "--resources gpu=1"
    for name in ("workflow/Snakefile", "config/README.md", "profiles/README.md", "README.md", "LICENSE"):
        assert (ROOT / name).is_file()
    # Where snakedeploy looks for it.
    assert (ROOT / "workflow/schemas/config.schema.json").read_bytes() == (
        ROOT / "config/config.schema.json"
    ).read_bytes()


def test_the_small_run_is_planned_as_a_directory_elsewhere() -> None:
    config = read_config([ROOT / "config/config.yaml", ROOT / ".test/config/config.yaml"], {})
    assert config.model.source == "digits" and config.calibration.num_samples == 4
    assert planned(ROOT, "--directory", ".test", "--forceall") == EVERYTHING


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_ci_runs_what_a_checkout_has(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        if command.startswith("make "):
            subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, check=True)


def test_the_notes_of_a_release_are_the_first_section_of_the_changelog() -> None:
    (command,) = re.findall(r"run: (awk .*) >", (ROOT / ".github/workflows/release.yaml").read_text())
    notes = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert notes.strip().startswith("- ") and "## " not in notes
