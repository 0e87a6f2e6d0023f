"""What the documents tell a reader to do works: commands, configs and links."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from snakemake.cli import parse_args

from auto_quantize_model.commands import auto_quantize
from auto_quantize_model.commands.draw_rule_graph import BEGIN, END, reduced
from auto_quantize_model.config import Config
from auto_quantize_model.config_text import read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [
    *(ROOT / folder / "README.md" for folder in ("resources", "results", "config", "profiles")),
    ROOT / "CHANGELOG.md",
]
RULE = re.compile(r"^rule (\w+):", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# The rules of a run in parts, which the picture does not show.
IN_PARTS = {"measure_probes", "measure_scores", "audit_part", "measure_heldout"}
# What a reader has from elsewhere.
OTHER = {"apptainer", "docker", "git", "cd", ".", "pip", "export", "snakedeploy"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Each command of the pages' `sh` blocks once, in words."""
    lines = {line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()}
    for line in sorted(lines):
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def rules() -> set[str]:
    workflow = ROOT / "workflow"
    return {
        name for path in (workflow / "Snakefile", *workflow.rglob("*.smk")) for name in RULE.findall(path.read_text())
    }


def check(words: list[str]) -> None:
    """Fail if the tool that a command names does not know the command."""
    program, *options = words
    configs = [word.removeprefix("CONFIG=") for word in options if ".yaml" in word]
    assert all((ROOT / file).is_file() for names in configs for file in names.split())
    if program == "make":
        made = subprocess.run(["make", "-n", *options], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    elif program == "snakemake":
        if "--workflow-profile" in options:  # its executor is a plugin, which need not be installed here
            at = options.index("--workflow-profile")
            assert (ROOT / options[at + 1] / "config.yaml").is_file()
            options[at + 1] = "none"
            for option in [word for word in options if word.startswith("--kubernetes-")]:
                first = options.index(option)
                del options[first : first + 2]
        _, given = parse_args(options)
        assert set(given.targets) <= rules()
    elif program == "auto-quantize":
        with pytest.raises(SystemExit) as ended:
            auto_quantize.parser().parse_args(options)
        assert ended.value.code == 0
    elif program.removeprefix(".venv/bin/") == "python":
        script, *options = options
        assert (ROOT / script).is_file()
        if script.startswith("scripts/"):
            auto_quantize.command(Path(script).stem).parser().parse_args(options)
    else:
        assert program in OTHER


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_documents_exists(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize("command", ["make gone", "snakemake gone --cores 1", "python scripts/clean_results.py --gone"])
def test_a_command_that_does_not_exist_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit)):
        check(command.split())


def read_with_the_defaults(*files: Path) -> Config:
    return read_config([ROOT / "config" / "config.yaml", *files], {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_config_of_the_documents_is_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        read_with_the_defaults(file)


def test_the_config_for_ones_own_model_is_valid_and_holds_the_lines_of_the_readme(tmp_path: Path) -> None:
    whole = read_with_the_defaults(ROOT / "config" / "local.yaml")
    shown = tmp_path / "shown.yaml"
    shown.write_text(blocks(ROOT / "README.md", "yaml")[0])
    assert read_with_the_defaults(ROOT / "config" / "local.yaml", shown) == whole


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_the_documents_lead_to_files(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_rule_graph_of_the_readme_has_few_edges_and_every_rule_of_a_run() -> None:
    graph = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    edges = re.findall(r"(\w+)_rule\[\w+\] --> (\w+)_rule", graph)
    assert 0 < len(edges) <= 16
    assert {rule for edge in edges for rule in edge} == rules() - {"all", "quantize_model", "compare_models"} - IN_PARTS


def test_an_edge_that_a_longer_path_implies_is_left_out() -> None:
    chain = [("a", "b"), ("b", "c"), ("c", "d")]
    assert reduced([*chain, ("a", "c"), ("a", "d"), ("b", "d")]) == chain
    diamond = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    assert reduced([*reversed(diamond), ("a", "d")]) == diamond
    assert reduced([]) == []
