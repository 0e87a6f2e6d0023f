"""Remove what the workflow wrote below `results/`, by the workflow's own records; files of anyone else stay.

In: Snakemake's records in `.snakemake`, and the markers of `folders`. Out: the paths of the files that stay.
"""

import base64
import contextlib
import re
import shutil
from pathlib import Path

from auto_quantize_model.files import MARKER, InputError, clear_leftovers
from auto_quantize_model.folders import files_in, require_own_folder

RULE = re.compile(r"^rule (\w+):", re.MULTILINE)


def clean_results(root: Path) -> list[Path]:
    """Remove the results that were written in the checkout `root`, and return the files that stay.

    Snakemake's records name the outputs. The names of the rules name the logs and benchmarks. Where a script wrote a
    whole folder, the folder's marker names its files.
    """
    results = root / "results"
    if not results.is_dir():
        return []
    for output in recorded_outputs(root / ".snakemake"):
        path = root / output
        if path.absolute().is_relative_to(results.absolute()) and ".." not in path.parts:
            if path.is_symlink() or path.is_file():
                path.unlink()
            if path.parent.is_dir():
                clear_leftovers(path)
    for marker in [file for file in files_in(results) if file.name == MARKER]:
        with contextlib.suppress(InputError):  # the folder holds a file of the user: the whole folder stays
            require_own_folder(marker.parent)
            shutil.rmtree(marker.parent)
    rules = [name for file in (root / "workflow" / "rules").glob("*.smk") for name in RULE.findall(file.read_text())]
    for folder, suffix in (("logs", ".log"), ("benchmarks", ".tsv")):
        for file in [file for file in files_in(results) if file.parent.name == folder and file.suffix == suffix]:
            if file.stem in rules:
                file.unlink()
    for place in sorted(results.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):  # a file, a link, or a folder that is not empty
            place.rmdir()
    return [file for file in files_in(results) if file != results / "README.md"]


def recorded_outputs(records: Path) -> list[str]:
    """The outputs that Snakemake has records of, finished or begun. A record's name is the output's path in base64."""
    names = []
    for kind in ("metadata", "incomplete"):
        for record in (path for path in (records / kind).rglob("*") if path.is_file()):
            # Snakemake cuts a long name into folders, and marks each of them but the last with an @.
            encoded = "".join(part.removeprefix("@") for part in record.relative_to(records / kind).parts)
            with contextlib.suppress(ValueError):  # not a record
                names.append(base64.urlsafe_b64decode(encoded).decode())
    return names
