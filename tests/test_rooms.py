"""The rooms of the library hold one direction of imports, and INC stays behind its wall."""

from pathlib import Path

import prose
import pytest
import structure

ROOT = prose.ROOT
# A room imports from the modules outside of any room, from the rooms named here, and from those that they may import.
# The package's own `__init__` and its `api` are the public API and may import from every room.
BELOW = {
    "root": set[str](),
    "schemes": {"root"},
    "models": {"schemes"},
    "data": {"models"},
    "made": {"data"},
    "replay": {"models", "schemes"},
    "measure": {"replay"},
    "inc": {"measure"},
    "decide": {"measure"},
    "report": {"decide"},
    "export": {"report"},
    "commands": {"export", "made", "inc"},
}
BELOW["package"] = set(BELOW)
MODULES = structure.modules(ROOT)
GRAPH = structure.import_graph(ROOT)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_the_rooms_below_it_alone(room: str) -> None:
    allowed = structure.reachable(BELOW)[room] | {room}
    upward = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if structure.room(module, MODULES) == room and structure.room(target, MODULES) not in allowed
    ]
    assert not upward


def test_every_room_has_its_place_in_the_order() -> None:
    assert {structure.room(module, MODULES) for module in MODULES} == set(BELOW)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert structure.circles(GRAPH) == []


def test_inc_is_imported_behind_its_wall_alone() -> None:
    inside = {module for module in MODULES if structure.room(module, MODULES) == "inc"} | {"inc_pytorch_mse_patching"}
    # The top rooms open the gate, in the functions that need INC.
    gates = {"__init__", "api"} | {module for module in MODULES if structure.room(module, MODULES) == "commands"}
    users = {module for module, path in MODULES.items() if structure.imported(path, "neural_compressor")}
    assert users and not users - inside
    ways = structure.reachable(GRAPH)
    assert not {module for module in GRAPH if ways[module] & users} - inside - gates
    assert not [path for path in (ROOT / "scripts").rglob("*.py") if structure.imported(path, "neural_compressor")]


def test_a_room_has_an_empty_init() -> None:
    inits = {module: path for module, path in MODULES.items() if path.name == "__init__.py" and module != "__init__"}
    assert {module for module in inits if "." not in module} == set(BELOW) - {"root", "package"}
    assert not [module for module, path in inits.items() if path.stat().st_size]


def test_tests_lie_in_the_rooms_of_what_they_test() -> None:
    misplaced = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.relative_to(ROOT / "tests").parent
        homes = {Path(*module.split(".")[:-1]) for module in MODULES if module.split(".")[-1] == path.stem[5:]}
        if not (ROOT / structure.LIBRARY / folder).is_dir() or (homes and folder not in homes):
            misplaced.append(str(path.relative_to(ROOT)))
    assert not misplaced


def test_an_import_in_a_function_counts_and_a_name_of_a_module_is_not_a_module(tmp_path: Path) -> None:
    folder = tmp_path / structure.LIBRARY
    for name, text in {
        "__init__.py": "from auto_quantize_model.a.one import work\n",
        "a/__init__.py": "",
        "a/one.py": "def work():\n    from auto_quantize_model.b import two\n    return two\n",
        "b/__init__.py": "",
        "b/two.py": "from auto_quantize_model.a.one import work\nimport auto_quantize_model.files as files\n",
        "files.py": "import json\nfrom pathlib import Path\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    graph = structure.import_graph(tmp_path)
    expected = {"__init__": {"a.one"}, "a.one": {"b.two"}, "b.two": {"a.one", "files"}, "a": set(), "b": set()}
    assert graph == expected | {"files": set()}
    assert structure.circles(graph) == [["a.one", "b.two"]]
    assert structure.floors(graph) == 3


def test_a_block_that_stands_twice_is_counted_once_at_its_full_length(tmp_path: Path) -> None:
    block = [f"step_{number}({number})" for number in range(8)]
    lines = ["import json", *block, "# a comment", "other()", "  ".join(block[:1]), *block[1:], ")"]
    path = tmp_path / "a.smk"
    path.write_text("\n".join(lines))
    assert structure.duplicated_blocks([path]) == [(path, path, 8)]
    assert structure.shape('run("a b", size=3.5) if done else x_1') == 'n("", n=0) if n else n'
