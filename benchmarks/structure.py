"""Measures the structure of a checkout: rooms, imports, circles, floors, loose types, copies, sizes, sentences.

    python benchmarks/structure.py [--root DIR] [--revision REV] [--before REV]

In: the files of a checkout, or those of a git revision. Out: a table in Markdown. Nothing of the checkout is imported.
A room is a folder of the library; the modules outside of any folder are one room. A circle is a group of modules that
import each other, also inside functions. Floors are the modules on the longest way along imports; a circle is one of
them. Two lines have the same shape if they differ in names, strings and numbers alone.
"""

import argparse
import ast
import io
import keyword
import re
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, zip_longest
from pathlib import Path
from statistics import mean

import prose

PACKAGE = "auto_quantize_model"
LIBRARY = f"src/{PACKAGE}"
WINDOW = 6  # lines that make a duplicated block
Graph = dict[str, set[str]]
Functions = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def modules(root: Path) -> dict[str, Path]:
    """The library's modules by their dotted names below the package; the package itself is `__init__`."""
    folder = root / LIBRARY
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def room(module: str, names: dict[str, Path]) -> str:
    """The folder that a module lies in; `root` for modules that lie in none.

    `package` is the package's `__init__` with `api`, whose functions the `__init__` hands out.
    """
    if module in ("__init__", "api"):
        return "package"
    return module.split(".")[0] if "." in module or names[module].name == "__init__.py" else "root"


def imported(path: Path, package: str = PACKAGE) -> set[str]:
    """The dotted names that a file imports, below `package`; `from a import b` gives `a` and `a.b`."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or not node.module:
                raise ValueError(f"{path}:{node.lineno}: a relative import; write the whole name of the module")
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{package}.") for name in names if name == package or name.startswith(f"{package}.")}


def import_graph(root: Path) -> Graph:
    """For each module of the library the modules that it imports, at its top or in a function."""
    names = modules(root)
    graph = {}
    for module, path in names.items():
        found = {name for name in imported(path) if name in names}
        # `from folder import module` needs the module; the folder itself counts only where a name comes from it.
        graph[module] = {name for name in found if not any(other.startswith(f"{name}.") for other in found)} - {module}
    return graph


def between_rooms(graph: Graph, names: dict[str, Path]) -> Graph:
    """For each room the other rooms that its modules import from."""
    rooms: Graph = {room(module, names): set() for module in graph}
    for module, targets in graph.items():
        rooms[room(module, names)] |= {room(target, names) for target in targets} - {room(module, names)}
    return rooms


def reachable(graph: Graph) -> Graph:
    """For each node all nodes that lie on a way from it."""
    found = {}
    for start in graph:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = graph[pending.pop()] - seen
            seen |= new
            pending += new
        found[start] = seen
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    ways = reachable(graph)
    groups = {frozenset(other for other in ways[node] if node in ways[other]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def floors(graph: Graph) -> int:
    """The number of nodes on the longest way, where a circle counts as one."""
    group_of = {node: circle[0] for circle in circles(graph) for node in circle}

    @cache
    def height(group: str) -> int:
        members = [node for node in graph if group_of.get(node, node) == group]
        below = {group_of.get(target, target) for node in members for target in graph[node]} - {group}
        return 1 + max((height(lower) for lower in below), default=0)

    return max(height(group_of.get(node, node)) for node in graph)


def code_lines(path: Path) -> list[str]:
    """The lines of code without indentation: no blank lines, comments, docstrings, imports or lone punctuation."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(parsed(path)) if path.suffix == ".py" else ():
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.strip() for number, line in enumerate(text.split("\n"), 1) if number not in left_out]
    return [" ".join(line.split()) for line in lines if re.search(r"\w", line) and not line.startswith("#")]


def shape(line: str) -> str:
    """A line with `""` for each string, `n` for each name but keywords, and `0` for each number."""
    line = re.sub(r"""[rbf]*("(\\.|[^"\\])*"|'(\\.|[^'\\])*')""", '""', line)
    line = re.sub(r"\b\d[\w.]*", "0", line)
    return re.sub(r"\b[^\W\d]\w*", lambda match: match[0] if keyword.iskeyword(match[0]) else "n", line)


Places = list[tuple[Path, int]]


def repeated(paths: list[Path], form: Callable[[str], str] = str) -> list[Places]:
    """For each WINDOW lines of code in a row that stand in two or more places, compared in a form: those places."""
    places: dict[tuple[str, ...], Places] = defaultdict(list)
    for path in paths:
        lines = [form(line) for line in code_lines(path)]
        for start in range(len(lines) - WINDOW + 1):
            places[tuple(lines[start : start + WINDOW])].append((path, start))
    # Less variety is a list of values and says nothing.
    return [found for window, found in places.items() if len(found) > 1 and len(set(window)) > WINDOW // 2]


def duplicated_blocks(paths: list[Path]) -> list[tuple[Path, Path, int]]:
    """Pairs of places that share WINDOW or more lines of code in a row, as two files and the number of lines."""
    starts = defaultdict(list)
    for places in repeated(paths):
        for (first, at), (second, there) in combinations(places, 2):
            if first != second or there - at >= WINDOW:
                starts[first, second, there - at].append(at)
    blocks = []
    for (first, second, _), found in starts.items():
        length = WINDOW
        for at, following in zip_longest(sorted(found), sorted(found)[1:]):  # neighbours are one block
            if following == at + 1:
                length += 1
            else:
                blocks.append((first, second, length))
                length = WINDOW
    return blocks


def code_files(root: Path, *folders: str) -> list[Path]:
    """Python and Snakemake files below folders of a checkout."""
    found = {path for folder in folders for path in (root / folder).rglob("*")}
    return sorted(path for path in found if path.suffix in (".py", ".smk") or path.name == "Snakefile")


def longest_function(paths: list[Path], root: Path) -> str:
    nodes = [(node, path) for path in paths for node in ast.walk(parsed(path)) if isinstance(node, Functions)]
    length, name, path = max(((node.end_lineno or 0) - node.lineno + 1, node.name, path) for node, path in nodes)
    return f"{length} lines: {name} in {path.relative_to(root)}"


def measured(root: Path) -> Iterator[tuple[str, object]]:
    """The rows of the table: what is measured and its value."""
    names, graph = modules(root), import_graph(root)
    rooms = between_rooms(graph, names)
    edges = [(module, target) for module in graph for target in graph[module]]
    library = list(names.values())
    python = [path for path in code_files(root, "src", "scripts") if path.suffix == ".py"]
    text = {path: path.read_text(encoding="utf-8") for path in python}
    yield "files in `src`", len(library)
    yield "lines in `src`", sum(text[path].count("\n") for path in library)
    yield "rooms", len(rooms.keys() - {"package"})
    yield "imports between modules", len(edges)
    yield "imports between rooms", sum(room(module, names) != room(target, names) for module, target in edges)
    yield "pairs of rooms that these join", sum(map(len, rooms.values()))
    yield "circles of modules", listed(circles(graph))
    yield "circles of rooms", listed(circles(rooms))
    yield "floors of modules", floors(graph)
    yield "floors of rooms", floors(rooms)
    yield "`dict[str, Any]` in `src`", sum(text[path].count("dict[str, Any]") for path in library)
    yield "string subscripts in `src`", sum(map(string_subscripts, library))
    users = [module for module, path in names.items() if imported(path, "neural_compressor")]
    yield "modules that import INC", f"{len(users)}: {', '.join(users)}"
    code = code_files(root, "src", "scripts", "workflow", "benchmarks")
    blocks = duplicated_blocks(code)
    yield f"pairs of places with {WINDOW} or more same lines", len(blocks)
    yield "lines in them", sum(length for _, _, length in blocks)
    places = {place for found in repeated(code, shape) for place in found}
    twice = {(path, start + offset) for path, start in places for offset in range(WINDOW)}
    yield f"lines that stand twice in their shape, {WINDOW} or more in a row", len(twice)
    lines, path = max((content.count("\n"), path) for path, content in text.items())
    yield "longest file in `src` and `scripts`", f"{lines} lines: {path.relative_to(root)}"
    yield "longest function in `src` and `scripts`", longest_function(python, root)
    calls = sum(content.count(".add_argument(") for content in text.values())
    yield "`add_argument` calls in `src` and `scripts`", calls
    found = [sentence for path in prose.files(root) for sentence in prose.sentences(path, root)]
    # Titles, names and numbers in cells are no sentences.
    words = [sentence.words for sentence in found if sentence.words >= 4]
    longest = max(found, key=lambda sentence: sentence.words)
    yield "words in a sentence, on average", f"{mean(words):.1f}"
    yield "words in the longest sentence", f"{longest.words}: {longest.path}:{longest.line}"
    yield f"sentences over {prose.MOST_WORDS} words", f"{sum(sentence.is_long for sentence in found)} of {len(words)}"
    yield "worn words", sum(len(sentence.worn) for sentence in found)


def string_subscripts(path: Path) -> int:
    """How often a file reads or writes `x["name"]`."""
    nodes = [node.slice for node in ast.walk(parsed(path)) if isinstance(node, ast.Subscript)]
    return sum(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in nodes)


def listed(groups: list[list[str]]) -> str:
    return f"{len(groups)}: {'; '.join(', '.join(group) for group in groups)}" if groups else "0"


def of_revision(root: Path, revision: str) -> dict[str, object]:
    """The rows of a git revision, whose files are unpacked into a temporary folder."""
    packed = subprocess.run(["git", "-C", str(root), "archive", revision], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder)  # noqa: S202  of this repository; `filter` needs Python 3.11.4
        return dict(measured(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=prose.ROOT, help="the checkout to measure (this one)")
    parser.add_argument("--revision", help="measure this git revision of the checkout instead of its files")
    parser.add_argument("--before", help="show this git revision in a column of its own, on the left")
    args = parser.parse_args()
    columns = {args.before: of_revision(args.root, args.before)} if args.before else {}
    name = args.revision or "checkout"
    columns[name] = of_revision(args.root, args.revision) if args.revision else dict(measured(args.root.resolve()))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in columns[name]:
        print(f"| {row} | {' | '.join(str(column[row]) for column in columns.values())} |")


if __name__ == "__main__":
    main()
