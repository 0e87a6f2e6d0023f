"""What a wheel holds, and what it asks for: the declared dependencies are the imports, in the versions of the lock."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = "auto_quantize_model"
LIBRARY = ROOT / "src" / PACKAGE
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
BASE = PROJECT["dependencies"]
DECLARED = [*BASE, *(entry for extra in PROJECT["optional-dependencies"].values() for entry in extra)]


def distributions(paths: Iterable[Path]) -> set[str]:
    """The distributions that Python files import from when they run."""
    found = set()
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        of_types = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        unread = {id(inner) for node in of_types for inner in ast.walk(node)}
        for node in nodes:
            if id(node) in unread:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    by_module = packages_distributions()
    return {canonicalize_name(by_module[name][0]) for name in found - set(sys.stdlib_module_names) - {PACKAGE}}


def names(entries: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(entry).name) for entry in entries}


def test_dependencies_are_the_imports_and_every_other_one_says_why() -> None:
    imported = distributions(LIBRARY.rglob("*.py"))
    assert imported <= names(DECLARED)
    for entry in DECLARED:
        if not names([entry]) <= imported:
            assert re.search(rf'"{re.escape(entry)}",? +# \w', TEXT), entry


def test_the_lock_has_a_version_that_each_dependency_allows() -> None:
    pinned = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "envs/requirements.lock").read_text(), re.M)
    versions = {canonicalize_name(name): version for name, version in pinned}
    for requirement in map(Requirement, DECLARED):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


IN_WHEEL = """
import json, sys
import auto_quantize_model as aq
assert not {"torch", "pandas", "pydantic"} & set(sys.modules)
from auto_quantize_model import api, options
from auto_quantize_model.commands import auto_quantize
used = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "auto_quantize_model"]
assert "neural_compressor" not in sys.modules and "transformers" not in sys.modules
public = {name: getattr(aq, name).__module__ for name in aq.__all__}
from auto_quantize_model.export import subject
from auto_quantize_model.report import document, page
found = [path.is_file() for path in [document.SCHEMA]] + [
    any(module.TEMPLATES.iterdir()) for module in (document, page, subject)
]
print(json.dumps([used, public, found]))
"""


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_library_and_asks_for_what_its_api_imports(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(LIBRARY, source / "src" / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([sys.executable, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith(f"{PACKAGE}/")}
        file.extractall(tmp_path / "wheel")
    files = [path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {path.relative_to(LIBRARY.parent).as_posix() for path in files}
    assert f"{PACKAGE}/py.typed" in held
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_WHEEL],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "wheel")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    used, public, found = json.loads(ended.stdout)
    assert all(Path(path).is_relative_to(tmp_path / "wheel") for path in used)
    assert set(public.values()) == {f"{PACKAGE}.{name}" for name in ("api", "files", "records")}
    assert found == [True] * 4
    # In the base stands what is imported before INC is asked for, and nothing else.
    assert not [path for path in used if Path(path).parent.name == "inc"]
    assert distributions(map(Path, used)) == names(BASE)
