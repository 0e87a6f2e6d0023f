"""A digest of code as code: it changes with what the code does, and not with comments, docstrings or formatting.

In: a script, or modules of this library. Out: one digest over every library file that they import, directly or through
other files. A file counts by its abstract syntax and its path. The rules of the workflow and the score store use it.
"""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from auto_quantize_model.files import InputError, digest_of, named_errors, sha256_bytes, sha256_file

PACKAGE = "auto_quantize_model"
# The parts of a statement that hold statements.
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


class Import(NamedTuple):
    """One import statement: the dots before the module, the module, and the names that are taken from it."""

    level: int
    module: str
    names: tuple[str, ...]


class Source(NamedTuple):
    """A Python file: the digest of its abstract syntax, and its imports.

    Attributes:
        digest: SHA-256 of the syntax without line numbers, comments and docstrings.
        at_import: the imports that run when the file is imported.
        in_functions: the imports that run when one of its functions is called.
    """

    digest: str
    at_import: tuple[Import, ...]
    in_functions: tuple[Import, ...]


def code_digest(root: Path, entry: str, *extra: str) -> str:
    """The digest of a script or module of a checkout, of all library files that it imports, and of extra files.

    Args:
        root: the checkout; the library lies in its `src`.
        entry: the script or module, relative to `root`.
        extra: files that the code reads, relative to `root`, such as templates; they count by their bytes. A folder
            stands for all files in it, at any depth.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        InputError: a file is missing, or a Python file does not parse.
    """
    digests = _digests([root / entry], root / "src")
    for path in map(root.joinpath, extra):
        for file in [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]:
            with named_errors(file):
                digests[file] = sha256_file(file)
    return digest_of({path.relative_to(root).as_posix(): digest for path, digest in digests.items()})


def code_digest_of_modules(modules: Iterable[str]) -> str:
    """The digest of modules of the running library and of all library files that they import.

    A wheel and a checkout with the same code have the same digest, because paths are relative to the library.

    Args:
        modules: full names, such as `auto_quantize_model.replay`.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        InputError: a module does not exist.
    """
    library = Path(__file__).parents[1]
    files = _modules(library)
    entries = []
    for name in modules:
        if name not in files:
            raise InputError(f"{name}: no module of this library; correct the name")
        entries.append(files[name])
    digests = _digests(entries, library)
    return digest_of({path.relative_to(library).as_posix(): digest for path, digest in digests.items()})


def _digests(entries: Iterable[Path], library: Path) -> dict[Path, str]:
    """The digests of the files at `entries`, and of every library file that these files run."""
    files = _modules(library)
    names = {path: name for name, path in files.items()}
    digests: dict[Path, str] = {}
    found: set[tuple[Path, bool]] = set()
    pending = {(entry, True) for entry in entries}
    while pending:
        found |= pending
        reached = set()
        for path, called in pending:
            source = _source(path)
            digests[path] = source.digest
            imports = source.at_import + (source.in_functions if called else ())
            reached |= _imported(imports, names.get(path, ""), path.name == "__init__.py", set(files))
        pending = {(files[name], called) for name, called in reached} - found
    return digests


def _imported(imports: Iterable[Import], name: str, is_package: bool, modules: set[str]) -> set[tuple[str, bool]]:
    """The modules that one module runs, each with whether its functions may be called.

    The `__init__` of every package above a module runs too. Its functions are not called for that reason, so their
    imports do not count, unless a name of the package itself is imported.

    Args:
        imports: those of the module.
        name: the module; empty for a script.
        is_package: whether the module is the `__init__` of the package `name`.
        modules: the names of all modules.
    """
    above = name.split(".") if is_package else name.split(".")[:-1]
    found = {(".".join(above[:end]), False) for end in range(1, len(above) + 1)}
    for level, module, taken in imports:
        if level:
            module = ".".join([*above[: len(above) - level + 1], *filter(None, [module])])
        # `from package import module` and `from module import name` look alike; files decide.
        submodules = {f"{module}.{part}" for part in taken} & modules
        found |= {(submodule, True) for submodule in submodules}
        if not taken or len(submodules) < len(taken):
            found.add((module, True))
    return {(name, called) for name, called in found if name in modules}


def _modules(library: Path) -> dict[str, Path]:
    """The files of the library's modules and packages by full name."""
    files = {}
    for path in sorted((library / PACKAGE).rglob("*.py"), key=lambda path: path.name == "__init__.py"):
        parts = path.relative_to(library).with_suffix("").parts
        files[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return files


def _source(path: Path) -> Source:
    """The Python file at `path` as it is now.

    Raises:
        InputError: the file is missing, or does not parse.
    """
    with named_errors(path):
        data = path.read_bytes()
    try:
        return _parsed(path.name, data)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not valid Python ({error}); correct the file") from None


@cache  # the rules share most modules
def _parsed(name: str, data: bytes) -> Source:
    """The digest and the imports of the Python file `name` with the content `data`."""
    tree = ast.parse(data, name)
    at_import: list[Import] = []
    in_functions: list[Import] = []
    _tidy(tree, at_import, in_functions)
    return Source(sha256_bytes(ast.dump(tree).encode()), tuple(at_import), tuple(in_functions))


def _tidy(node: ast.AST, now: list[Import], later: list[Import]) -> None:
    """Remove text statements, such as docstrings, from a tree, and collect its imports.

    Args:
        node: the tree, or a part of it.
        now: takes the imports that run with `node` itself.
        later: takes the imports in functions.
    """
    for name in BLOCKS:
        block = [child for child in getattr(node, name, ()) if not _is_text(child)]
        if hasattr(node, name):
            setattr(node, name, block)
        for child in block:
            if isinstance(child, ast.If) and "TYPE_CHECKING" in vars(child.test).values():
                child.body = []  # never runs
            if isinstance(child, ast.Import):
                now += [Import(0, alias.name, ()) for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                now.append(Import(child.level, child.module or "", tuple(alias.name for alias in child.names)))
            else:
                _tidy(child, later if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else now, later)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
