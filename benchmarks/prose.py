"""Finds long sentences and worn words in the texts of a checkout: documents, docstrings, comments, --help, templates.

    python benchmarks/prose.py [FILES...]    each violation with file and line; no FILES: every text of this checkout

In: files. Out: sentences with their lines. A sentence has at most 25 words. A code span, a file name, a version number
or a list of code spans counts as one word. Each list item and each table cell is a text of its own. Lines that are
indented by four spaces after a blank line are code. A value that code puts into a message counts as one word.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_WORDS = 25
WORN_WORDS = (
    *("whence", "anew", "turned round", "at the least", "beside", "none of", "(?<!there )is no(?! longer)"),
    *("the whole story", "goes on where it ended", "chatter", "earns? its place", "that by which"),
)
PLACES = (
    *("*.md", "Makefile", "pyproject.toml", "docs/**/*.md", "config/**/*.md", "config/**/*.yaml", "envs/*.in"),
    *("envs/*.yaml", "profiles/*.md", ".test/config/*.yaml", ".github/workflows/*.yaml", "CITATION.cff"),
    *("resources/README.md", "resources/*/README.md", "results/README.md", ".snakemake-workflow-catalog.yml"),
    *("src/**/*", "scripts/**/*.py", "workflow/**/*", "benchmarks/**/*.py"),
)

Text = tuple[int, str]  # the number of its first line, and its lines

WORN = re.compile(rf"\b({'|'.join(WORN_WORDS)})\b", re.IGNORECASE)
ABBREVIATIONS = re.compile(r"(^|[\s(])(e\.g|i\.e|etc|cf|vs|approx|ca|no|fig|resp)\.$", re.IGNORECASE)
END = re.compile(r"""[.!?]["'”)\]*_]*(?=\s|$)""")
CODE = re.compile(r"(`+)[^`]+\1")
CODE_LIST = re.compile(r"`x+`(?:,?\s+(?:(?:and|or)\s+)?`x+`)+")
NOT_READ = re.compile(r"\]\([^)\s]*\)|https?://[^\s)>]+|</?[a-z][^<>]*>|<!--.*?-->", re.DOTALL)
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):\s*")
DESCRIPTION = re.compile(r"""\s*"?description"?: ["']?(?=\w|`)(.*?)["']?,?$""")
DIRECTIVE = re.compile(r"!|(noqa|type|fmt|ruff|mypy|pragma):|%%")
HELP = ("help", "description", "epilog")
FEWEST_WORDS = 6  # of a string in code that is read as a message to a person


@dataclass(frozen=True)
class Sentence:
    """One sentence: where it begins, its words on one line, their number, and the worn words among them."""

    path: Path
    line: int
    text: str
    words: int
    worn: tuple[str, ...]

    @property
    def is_long(self) -> bool:
        return self.words > MOST_WORDS


def blank(match: re.Match[str]) -> str:
    """Spaces in place of a match, so that offsets and lines stay."""
    return re.sub(r"\S", " ", match[0])


def split_sentences(text: str) -> Iterator[tuple[int, str, str]]:
    """The offset of each sentence of a paragraph, its text, and the same text with `x` for each code span."""
    text = NOT_READ.sub(blank, text)
    masked = CODE.sub(lambda match: f"`{'x' * (len(match[0]) - 2)}`", text)
    start = 0
    for end in [*END.finditer(masked), None]:
        stop = end.end() if end else len(masked)
        before = masked[start : end.start() + 1] if end else ""
        if end and (ABBREVIATIONS.search(before) or before.endswith("..") or not re.search(r"\w", before)):
            continue
        if re.search(r"\w", masked[start:stop]):
            indent = len(text[start:stop]) - len(text[start:stop].lstrip())
            yield start + indent, text[start + indent : stop], masked[start + indent : stop]
        start = stop


def sentences(path: Path, root: Path = ROOT) -> list[Sentence]:
    """The sentences of a file that a person reads."""
    found = []
    for line, text in texts(path):
        for offset, sentence, masked in split_sentences(text):
            words = len(re.findall(r"\S*\w\S*", CODE_LIST.sub("`x`", masked)))
            worn = tuple(match.lower() for match in WORN.findall(" ".join(masked.split())))
            place = path.relative_to(root) if path.is_relative_to(root) else path
            number = line + text[:offset].count("\n")
            found.append(Sentence(place, number, " ".join(sentence.split()), words, worn))
    return sorted(found, key=lambda sentence: sentence.line)


def paragraphs(text: str, first: int = 1) -> Iterator[Text]:
    """The paragraphs, headings, list items and table cells of Markdown, without its code blocks."""
    block: list[str] = []
    start, fenced, after_blank = first, False, True
    for number, line in enumerate([*text.split("\n"), ""], first):
        line = re.sub(r"^\s*>\s?", "", line)
        fence, row, heading = (line.lstrip().startswith(sign) for sign in ("```", "|", "#"))
        if block and (fence or row or heading or not line.strip() or ITEM.match(line)):
            yield start, "\n".join(block)
            block = []
        fenced ^= fence
        is_code = not block and after_blank and line.startswith("    ") and not ITEM.match(line)
        if fence or fenced or is_code:
            continue
        after_blank = not line.strip()
        if row:
            yield from ((number, cell) for cell in line.split("|"))
        elif heading:
            yield number, line.lstrip("# ")
        elif line.strip():
            start = start if block else number
            block.append(ITEM.sub("", line, count=1) if not block else line)


def docstring(text: str, first: int) -> Iterator[Text]:
    """The paragraphs of a docstring; each entry of a section such as `Args:` is one."""
    lines, in_section = [], False
    indents = [len(line) - len(line.lstrip()) for line in text.split("\n")[1:] if line.strip()]
    for number, line in enumerate(text.split("\n")):
        line = line[min(indents) :] if number and indents else line
        if SECTION.fullmatch(line):
            in_section, line = True, ""
        elif line.strip() and not line.startswith(" "):
            in_section = False
        if in_section:
            line = re.sub(r"^ {4}(?=\S)", "- ", line)
        lines.append(line)
    yield from paragraphs("\n".join(lines), first)


def grouped(comments: list[tuple[int, bool, str]]) -> Iterator[Text]:
    """Comments as texts: those on neighbouring lines of their own are one. An item is line, own line or not, text."""
    block: list[str] = []
    start = 0
    for number, own_line, text in comments:
        if DIRECTIVE.match(text.lstrip()):
            continue
        if block and own_line and number == start + len(block):
            block.append(text)
            continue
        yield from paragraphs("\n".join(block), start)
        block, start = [text], number
        if not own_line:
            yield number, text
            block = []
    yield from paragraphs("\n".join(block), start)


def line_comments(text: str, sign: str) -> Iterator[Text]:
    """The comments of a file in which `sign` begins one after white space: YAML, make, JavaScript."""
    pattern = re.compile(rf"(^\s*|.*?\s)@?{sign}+ (.*)")
    matches = [(number, pattern.match(line)) for number, line in enumerate(text.split("\n"), 1)]
    yield from grouped([(number, not match[1].strip(), match[2]) for number, match in matches if match])


def descriptions(text: str) -> Iterator[Text]:
    """The descriptions in a schema, one on a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if match := DESCRIPTION.match(line):
            yield number, match[1]


def lexical(text: str, with_docstrings: bool = True) -> Iterator[Text]:
    """The comments of Python, and the strings in triple quotes where a file is not plain Python, as a Snakefile."""
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[: token.start[1]].strip()
            comments.append((token.start[0], own_line, token.string.lstrip("#")))
        elif with_docstrings and token.type == tokenize.STRING and token.string.startswith('"""'):
            yield from docstring(token.string.strip('"'), token.start[0])
    yield from grouped(comments)


def strings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.Constant | ast.JoinedStr]]:
    """Each string below a node of the syntax tree, with the node that holds it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            yield node, child
        else:
            yield from strings(child)


def written(string: ast.Constant | ast.JoinedStr) -> str:
    """The text of a string, with `x` for each value that is put into it."""
    if isinstance(string, ast.Constant):
        return str(string.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in string.values)


def python(text: str) -> Iterator[Text]:
    """Docstrings, comments, the texts for --help, and strings that are long enough for a message."""
    for holder, string in strings(ast.parse(text)):
        said = written(string)
        if isinstance(holder, ast.Expr):
            yield from docstring(said, string.lineno)
        elif isinstance(holder, ast.keyword) and holder.arg in HELP:
            yield string.lineno, said
        elif len(said.split()) >= FEWEST_WORDS and "\n" not in said:
            yield string.lineno, said
    yield from lexical(text, with_docstrings=False)


def without_jinja(text: str) -> str:
    """A template with `x` for each value, and a form feed for each `else`, which separates texts."""
    text = re.sub(r"\{% raw %\}.*?\{% endraw %\}|\{#.*?#\}", blank, text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", lambda match: "x" + "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*\{%.*?%\}[ \t]*$", blank, text, flags=re.MULTILINE)
    return re.sub(r"\{%-?\s*(\w+).*?%\}", lambda match: "\f" if match[1] in ("else", "elif") else "", text)


def html(text: str) -> Iterator[Text]:
    """The texts between the block elements of a page."""
    text = re.sub(r"<(script|style)\b.*?</\1>", blank, text, flags=re.DOTALL)
    text = re.sub(r"<code\b[^>]*>.*?</code>", "`x`", text)
    text = re.sub(r"</?(?:a|b|em|i|span|strong|sub|sup)\b[^>]*>", "", text)
    line = 1
    for piece in re.split(r"<[^>]*>", text):
        yield line, piece
        line += piece.count("\n")


def texts(path: Path) -> Iterator[Text]:
    """The texts in a file, by the ending of its name; a file without any has none."""
    name = path.name.removesuffix(".j2")
    content = path.read_text(encoding="utf-8")
    if path.suffix in (".j2", ".rst"):  # Snakemake's captions are templates too
        content = without_jinja(content)
    found: Iterator[Text] = iter(())
    if name.endswith((".md", ".rst")):
        found = paragraphs(content)
    elif name.endswith(".html"):
        found = html(content)
    elif path.suffix == ".py":
        found = python(content)
    elif name.endswith((".py", ".smk")) or name == "Snakefile":
        found = lexical(content)
    elif name.endswith((".yaml", ".yml", ".toml", ".in")) or name == "Makefile":
        found = chain(descriptions(content), line_comments(content, "#"))
    elif name.endswith(".json"):
        found = descriptions(content)
    elif name.endswith(".js"):
        found = line_comments(content, "//")
    for line, text in found:
        for part in re.finditer(r"[^\f]+", text):
            yield line + text[: part.start()].count("\n"), part[0]


def files(root: Path = ROOT) -> list[Path]:
    """The files of a checkout that may hold texts."""
    found = {path for place in PLACES for path in root.glob(place) if path.is_file()}
    readable = (".md", ".rst", ".py", ".smk", ".yaml", ".yml", ".toml", ".in", ".js", ".json", ".html", ".j2")
    return sorted(path for path in found if path.suffix in readable or path.name in ("Makefile", "Snakefile"))


def violations(paths: list[Path], root: Path = ROOT) -> list[Sentence]:
    """The sentences that are too long or hold worn words."""
    return [sentence for path in paths for sentence in sentences(path, root) if sentence.is_long or sentence.worn]


def described(found: list[Sentence]) -> Iterator[str]:
    """The violations as lines for a person: for each file its counts, then its sentences."""
    for path in sorted({sentence.path for sentence in found}):
        of_file = [sentence for sentence in found if sentence.path == path]
        yield f"{path}: {counted(of_file)}"
        for sentence in of_file:
            reasons = [*([f"{sentence.words} words"] if sentence.is_long else []), *sentence.worn]
            yield f"  {path}:{sentence.line}: {', '.join(reasons)}: {sentence.text}"


def counted(found: list[Sentence]) -> str:
    """The number of violations of both kinds."""
    long, worn = sum(sentence.is_long for sentence in found), sum(len(sentence.worn) for sentence in found)
    return f"{long} sentences over {MOST_WORDS} words, {worn} worn words"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="the files to read; none: every text of this checkout")
    paths = [path.resolve() for path in parser.parse_args().files] or files()
    found = violations(paths)
    print(*described(found), f"{len(paths)} files: {counted(found)}", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
