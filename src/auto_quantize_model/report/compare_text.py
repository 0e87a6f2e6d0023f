"""A comparison of two reports as text. In: what `compare` returns. Out: the sentences of its Markdown and its page.

The sentences take the function that writes a name: `code` for Markdown, and `str` for the page, which escapes all text.
"""

import math
from collections.abc import Callable
from typing import Any

from auto_quantize_model.escape import code
from auto_quantize_model.report.compare import decibels
from auto_quantize_model.report.document import markdown_cell
from auto_quantize_model.report.sentences import number

Named = Callable[[str], str]
SHOWN = 20  # so many names of a list are shown
LEGEND = (
    "Ranks are counted among the common ops; 1 is the most sensitive. In brackets: the ranks that the op would get"
    " with its score one spread higher or lower. The spread is the standard deviation between batches, or the standard"
    " error of an estimate. A move is beyond the noise where the two ranges share no rank."
)
UNCHANGED = "Model, calibration set, engine, device, instruction set and versions are the same."
BEYOND = {True: "yes", False: "no", None: "unknown"}


def to_markdown(comparison: dict[str, Any], shown: int = SHOWN) -> str:
    """The comparison as Markdown: the verdict first, then the changes, the top set, and the largest moves."""
    lines = [
        "# Two sensitivity reports compared",
        "",
        *_verdict_lines(comparison, shown),
        *(line for warning in comparison["warnings"] for line in (f"> **Warning:** {warning}", "")),
        of_tau(comparison),
        "",
        *_changed_lines(comparison, shown),
        "",
        *_top_lines(comparison, shown),
        "",
        *_move_lines(comparison, shown),
    ]
    return "\n".join(lines) + "\n"


def verdict(comparison: dict[str, Any], named: Named, shown: int = SHOWN) -> tuple[str, str, list[str]]:
    """The verdict in a few words, what follows it in the same sentence, and what else belongs to it.

    Reports within the limits agree only if no op joined or left the top set beyond the noise. What else belongs to it
    are the reasons of a difference, or else the limits.
    """
    if comparison["differs"]:
        return "The reports differ:", "", comparison["reasons"]
    limits, top = comparison["limits"], comparison["top"]
    allowed = (
        f"The limits allow {limits['changes']} ops to join the {top} most sensitive, and all-INT8 to lose"
        f" {decibels(limits['sqnr_drop'])}. The verdict is about rankings and all-INT8, and not about the profiles."
    )
    moves = [
        f"{named(move['op_name'])} went from rank {move['first']} to {move['second']}"
        for move in (*comparison["entered"], *comparison["left"])
        if move["beyond_noise"] is not False
    ]
    moves += [f"{named(name)} is new" for name in comparison["new_in_top"]]
    moves += [f"{named(name)} is gone" for name in comparison["gone_from_top"]]
    if not moves:
        return "The reports agree.", "", [allowed]
    rest = [f"{len(moves) - shown} more"] if len(moves) > shown else []
    found = ", ".join([*moves[:shown], *rest])
    return "The reports differ within the limits:", f" of the {top} most sensitive ops, {found}.", [allowed]


def of_tau(comparison: dict[str, Any]) -> str:
    """How far the two rankings agree, and the batches of one run."""
    return (
        f"Kendall's tau is {number(comparison['tau'])} over {comparison['common']} common ops; batches of one run"
        + (
            " were not compared."
            if comparison["noise_tau"] is None
            else f" agree by {number(comparison['noise_tau'])}."
        )
    )


def of_sqnr(comparison: dict[str, Any]) -> str:
    """The SQNR of all-INT8 in both."""
    values = (decibels(math.inf if value is None else value) for value in comparison["sqnr_db"])
    return f"With every op in INT8: {', then '.join(values)} (SQNR)."


def of_moves(comparison: dict[str, Any]) -> str:
    """How many ops moved beyond the noise and within it."""
    flags = [move["beyond_noise"] for move in comparison["moved"]]
    unknown = f", {flags.count(None)} by unknown noise (one batch has no spread)" if None in flags else ""
    return (
        f"{flags.count(True)} of {comparison['common']} common ops moved beyond the noise{unknown},"
        f" {flags.count(False)} within it."
    )


def _verdict_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    words, rest, others = verdict(comparison, code, shown)
    if comparison["differs"]:
        return [f"**{words}**", "", *(f"- {reason}" for reason in others), ""]
    return [f"**{words}**{rest}", "", *others, ""]


def _changed_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    cell = markdown_cell
    rows = [f"| {cell(row['what'])} | {cell(row['first'])} | {cell(row['second'])} |" for row in comparison["changed"]]
    return [
        "## What changed",
        "",
        *(["| changed | first | second |", "|---|---|---|", *rows] if rows else [UNCHANGED]),
        "",
        f"{of_sqnr(comparison)} {_profile_line(comparison['profile'], shown)}",
        "",
        f"Only in the first: {_listed(comparison['only_first'], shown)}. Only in the second:"
        f" {_listed(comparison['only_second'], shown)}.",
    ]


def _profile_line(profile: dict[str, Any] | None, shown: int) -> str:
    if profile is None:
        return "The reports have no profile in common."
    first, second = profile["bits"]
    sizes = f"The profile {profile['name']} has {first:.2f} bits a weight in the first and {second:.2f} in the second"
    alone = [unit for side in profile["only"] for unit in side]
    others = f" Units of one report alone: {_listed(alone, shown)}." if alone else ""
    if not profile["schemes"]:
        return f"{sizes}. Each {'common unit' if alone else 'unit'} has the same scheme.{others}"
    moves = [
        f"{code(unit)} from {markdown_cell(one)} to {markdown_cell(other)}"
        for unit, (one, other) in profile["schemes"].items()
    ]
    rest = [f"{len(moves) - shown} more"] if len(moves) > shown else []
    return f"{sizes}. Units with another scheme: {', '.join([*moves[:shown], *rest])}.{others}"


def _top_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    moves = [(change, move) for change in ("entered", "left") for move in comparison[change]]
    return [
        f"## The {comparison['top']} most sensitive",
        "",
        *(_move_table(moves) if moves else ["No common op entered or left them."]),
        "",
        f"New in the second report and among its {comparison['top']}: {_listed(comparison['new_in_top'], shown)}. Of"
        f" the {comparison['top']} of the first and not in the second: {_listed(comparison['gone_from_top'], shown)}.",
    ]


def _move_lines(comparison: dict[str, Any], shown: int) -> list[str]:
    """The moves that noise does not or may not explain, as a table; the other moves as a number."""
    flags = [move["beyond_noise"] for move in comparison["moved"]]
    listed = [move for move in comparison["moved"] if move["beyond_noise"] is not False]
    largest = f" The largest {shown}:" if len(listed) > shown else ""
    table = _move_table([("up" if move["second"] < move["first"] else "down", move) for move in listed[:shown]])
    return [
        "## Moves",
        "",
        f"{of_moves(comparison)}{largest}",
        *(["", *table] if listed else []),
        *(["", LEGEND] if flags else []),
    ]


def _move_table(moves: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [
        "| op_name | move | first rank | second rank | beyond the noise |",
        "|---|---|---:|---:|---|",
        *(
            f"| {code(move['op_name'])} | {how} | {rank_of(move, 'first')} | {rank_of(move, 'second')}"
            f" | {BEYOND[move['beyond_noise']]} |"
            for how, move in moves
        ),
    ]


def rank_of(move: dict[str, Any], which: str) -> str:
    """A rank with the ranks that the noise allows."""
    first, last = move[f"{which}_range"] or (None, None)
    return str(move[which]) if first == last else f"{move[which]} ({first}–{last})"


def _listed(names: list[str], shown: int) -> str:
    rest = [f"{len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*(code(name) for name in names[:shown]), *rest]) or "none"
