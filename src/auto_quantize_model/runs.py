"""A table of runs: several models and calibration sets, each measured by the whole workflow.

In: a table with a row for each run. Out: the checked config of each row. `workflow/models.smk` makes a module of each.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from auto_quantize_model.config import Config
from auto_quantize_model.config_text import read_config
from auto_quantize_model.files import InputError

COLUMNS = ("model", "config", "calibration")


def read_runs(table: Path, checkout: Path, files: Iterable[Path], overrides: Mapping[str, Any]) -> dict[str, Config]:
    """The config of each row, by a name that can begin the name of a rule.

    Args:
        table: tab-separated, with the columns of `COLUMNS`. `model` is the name of the run's results, so each row
            has another one. `config` lists config files with spaces between them. `calibration` is one more, and may
            be empty. A file that does not exist in the working directory is taken from the checkout. A line that begins
            with # is a remark.
        checkout: holds the defaults, below all other files.
        files: configs of all runs, above those of the row.
        overrides: the values of `--config`, above all files.

    Raises:
        InputError: a line for each problem, with the table, the row and the next step.
    """
    found: dict[str, Config] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, row in _rows(table):
        where = f"{table}: line {number}"
        if (first := lines.setdefault(row["model"], number)) != number:
            problems.append(
                f"{where}: {row['model']} names the results of line {first}; write another name for this run"
            )
        named = [Path(word) for word in f"{row['config']} {row['calibration']}".split()]
        of_row = [path if path.exists() or not (checkout / path).exists() else checkout / path for path in named]
        given = {**overrides, "model": {**overrides.get("model", {}), "name": row["model"]}}
        try:
            config = read_config([checkout / "config/config.yaml", *of_row, *files], given)
        except InputError as error:
            problems += [f"{where}: {line}" for line in str(error).splitlines()]
            continue
        name = re.sub(r"\W", "_", config.model.name)
        found[f"{name}_{number}" if name in found else name] = config
    if problems:
        raise InputError("\n".join(problems))
    return found


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table, with the numbers of their lines."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{table}: cannot be read ({error}); give a table with the columns {', '.join(COLUMNS)}"
        ) from None
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")]
    cells = [
        (number, [cell.strip() for cell in words]) for number, line in kept for words in csv.reader([line], "excel-tab")
    ]
    if not cells or tuple(cells[0][1]) != COLUMNS:
        raise InputError(f"{table}: the first line is not {' '.join(COLUMNS)}, with tabs between; correct it")
    if not cells[1:]:
        raise InputError(f"{table}: no row; add one for each run")
    found = []
    for number, row in cells[1:]:
        if len(row) > len(COLUMNS) or not row[0]:
            raise InputError(
                f"{table}: line {number}: not a name, configs and a calibration with tabs between; correct it"
            )
        found.append((number, dict(zip(COLUMNS, [*row, "", ""], strict=False))))
    return found
