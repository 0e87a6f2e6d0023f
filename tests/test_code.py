"""The digest of code follows imports, and comments, docstrings and formatting leave it as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from auto_quantize_model.code import code_digest, code_digest_of_modules
from auto_quantize_model.files import InputError

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/run.py"
FILES = {
    SCRIPT: "from auto_quantize_model.top import work\n",
    "src/auto_quantize_model/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from auto_quantize_model.unused import nothing\n"
        "def __getattr__(name):\n    from auto_quantize_model import unused\n    return getattr(unused, name)\n"
    ),
    "src/auto_quantize_model/top.py": (
        '"""Top."""\n'
        "from .room import LIMIT  # a name of the package itself\n"
        "import auto_quantize_model.plain as plain\n"
        "def work():\n"
        '    """Work."""\n'
        "    from auto_quantize_model.room.deep import inner\n"
        "    return inner, LIMIT, plain, 'text'\n"
    ),
    "src/auto_quantize_model/plain.py": "SIZE = 1\n",
    "src/auto_quantize_model/room/__init__.py": "LIMIT = 1\ndef later():\n    from . import lazy\n",
    "src/auto_quantize_model/room/lazy.py": "LAZY = 1\n",
    "src/auto_quantize_model/room/deep/__init__.py": "",
    "src/auto_quantize_model/room/deep/inner.py": "from ...far import away\nfrom .. import beside\n",
    "src/auto_quantize_model/room/beside.py": "BESIDE = 1\n",
    "src/auto_quantize_model/far/__init__.py": "",
    "src/auto_quantize_model/far/away.py": "import os\n\n\nclass Away:\n    'Far.'\n\n    x: int = 1\n    'An x.'\n",
    "src/auto_quantize_model/unused.py": "nothing = 1\n",
    "templates/page/page.j2": "<p>\n",
}
LIBRARY = "src/auto_quantize_model"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def replace(name: str, old: str, new: str) -> Callable[[Path], object]:
    assert old in FILES[name]
    return lambda root: (root / name).write_text(FILES[name].replace(old, new))


@pytest.mark.parametrize(
    "change",
    [
        replace(SCRIPT, "\n", "  # a comment\n"),
        replace(f"{LIBRARY}/top.py", "Top.", "The top of all."),
        replace(f"{LIBRARY}/top.py", '    """Work."""\n', ""),
        replace(f"{LIBRARY}/far/away.py", "'Far.'", '"""Far\n    away."""'),
        replace(f"{LIBRARY}/far/away.py", "    'An x.'\n", ""),
        replace(f"{LIBRARY}/top.py", "inner, LIMIT, plain, 'text'", '(inner,\n        LIMIT, plain, "text")'),
        replace(f"{LIBRARY}/unused.py", "1", "2"),
        lambda root: (root / LIBRARY / "new.py").write_text("x = 1\n"),
    ],
    ids=["comment", "module", "function", "class", "attribute", "formatting", "unreached", "new"],
)
def test_comments_docstrings_formatting_and_modules_out_of_reach_count_for_nothing(
    root: Path, change: Callable[[Path], object]
) -> None:
    before = code_digest(root, SCRIPT)
    change(root)
    assert code_digest(root, SCRIPT) == before


@pytest.mark.parametrize(
    "name", [name for name, text in FILES.items() if text and name.endswith(".py") and "unused" not in name]
)
def test_a_changed_value_counts_in_every_file_that_is_reached(root: Path, name: str) -> None:
    """By `import`, by `from`, by relative imports, in functions, and as the `__init__` of a package above."""
    before = code_digest(root, SCRIPT)
    (root / name).write_text(f"{FILES[name]}changed = 1\n")
    assert code_digest(root, SCRIPT) != before


def test_a_new_import_and_a_changed_text_count(root: Path) -> None:
    found = {code_digest(root, SCRIPT)}
    replace(f"{LIBRARY}/top.py", "'text'", "'words'")(root)
    found.add(code_digest(root, SCRIPT))
    replace(SCRIPT, "import work", "import work\nimport auto_quantize_model.unused")(root)
    found.add(code_digest(root, SCRIPT))
    (root / LIBRARY / "unused.py").write_text("nothing = 2\n")
    assert code_digest(root, SCRIPT) not in found and len(found) == 3


def test_a_moved_module_counts_where_it_is_used_and_nowhere_else(root: Path) -> None:
    (root / "scripts/other.py").write_text("from auto_quantize_model import plain\n")
    before, other = code_digest(root, SCRIPT), code_digest(root, "scripts/other.py")
    (root / LIBRARY / "far/away.py").rename(root / LIBRARY / "away.py")
    replace(f"{LIBRARY}/room/deep/inner.py", "...far", "...")(root)
    assert code_digest(root, SCRIPT) != before
    assert code_digest(root, "scripts/other.py") == other


def test_what_the_package_imports_lazily_counts_only_where_a_name_of_the_package_is_imported(root: Path) -> None:
    (root / "scripts/api.py").write_text("import auto_quantize_model as aq\n")
    script, api = code_digest(root, SCRIPT), code_digest(root, "scripts/api.py")
    (root / LIBRARY / "unused.py").write_text("nothing = 2\n")
    assert code_digest(root, SCRIPT) == script
    assert code_digest(root, "scripts/api.py") != api


def test_extra_files_count_by_their_bytes_and_a_folder_with_all_its_files(root: Path) -> None:
    found = {code_digest(root, SCRIPT), code_digest(root, SCRIPT, "templates")}
    (root / "templates/page/page.j2").write_text("<p>\n\n")
    found.add(code_digest(root, SCRIPT, "templates"))
    (root / "templates/page/page.j2").rename(root / "templates/page.j2")
    found.add(code_digest(root, SCRIPT, "templates"))
    assert len(found) == 4
    assert code_digest(root, SCRIPT, "templates") == code_digest(root, SCRIPT, "templates/page.j2")


@pytest.mark.parametrize("text", ["x = 1\nif x:\n", "x = '\0'\n", "x = '\xe4'\n"])
def test_a_file_that_does_not_parse_is_named(root: Path, text: str) -> None:
    (root / LIBRARY / "plain.py").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"/plain\.py: not valid Python \(.*\); correct the file$"):
        code_digest(root, SCRIPT)


def test_a_missing_script_template_or_module_is_named(root: Path) -> None:
    with pytest.raises(InputError, match=r"/scripts/gone\.py: no such file"):
        code_digest(root, "scripts/gone.py")
    with pytest.raises(InputError, match=r"/gone\.j2: no such file"):
        code_digest(root, SCRIPT, "gone.j2")
    with pytest.raises(InputError, match=r"^auto_quantize_model\.gone: no module of this library"):
        code_digest_of_modules(["auto_quantize_model.gone"])


def test_modules_of_the_running_library_have_a_digest_of_their_own(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    names = [f"auto_quantize_model.{name}" for name in ("measure.metrics", "replay.model", "replay")]
    assert len({code_digest_of_modules([name]) for name in names}) == len(names)
    assert code_digest_of_modules(iter(names)) == code_digest_of_modules(names) != code_digest_of_modules([])
    # An installed package lies in another folder, and names its files alike.
    monkeypatch.setattr("auto_quantize_model.code.__file__", str(root / LIBRARY / "code.py"))
    before = code_digest_of_modules(["auto_quantize_model.top", "auto_quantize_model.room"])
    (root / "src").rename(root / "wheel")
    monkeypatch.setattr("auto_quantize_model.code.__file__", str(root / "wheel/auto_quantize_model/code.py"))
    assert code_digest_of_modules(["auto_quantize_model.room", "auto_quantize_model.top"]) == before


def test_a_comment_and_a_docstring_in_every_file_of_this_project_change_no_digest(tmp_path: Path) -> None:
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.py")]
    before = {script: code_digest(ROOT, script) for script in scripts}
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "src").rglob("*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f'# A comment.\n"""Another docstring."""\n{path.read_text()}# The end.\n')
    assert {script: code_digest(tmp_path, script) for script in scripts} == before
