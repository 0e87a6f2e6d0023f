"""What the workflow wrote below `results/`, removed by its own records; what anyone else put there stays.

In: Snakemake's records in `.snakemake`, and the markers of `folders`. Out: the files that are left, to be named.
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
    """Remove the results that were written in the checkout `root`; the files that stay, which it did not write.

    Outputs are known by Snakemake's records; logs and benchmarks by the names of the rules;
    what lies in a folder that a script wrote whole, by the folder's marker.
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
        with contextlib.suppress(InputError):  # a file of the user's lies among them: all of the folder stays
            require_own_folder(marker.parent)
            shutil.rmtree(marker.parent)
    rules = [name for file in (root / "workflow" / "rules").glob("*.smk") for name in RULE.findall(file.read_text())]
    for folder, suffix in (("logs", ".log"), ("benchmarks", ".tsv")):
        for file in [file for file in files_in(results) if file.parent.name == folder and file.suffix == suffix]:
            if file.stem in rules:
                file.unlink()
    for place in sorted(results.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):  # a file, a link, or not empty
            place.rmdir()
    return [file for file in files_in(results) if file != results / "README.md"]


def recorded_outputs(records: Path) -> list[str]:
    """The outputs that Snakemake has records of, finished or begun: their names are those of the records, in base64."""
    names = []
    for kind in ("metadata", "incomplete"):
        for record in (path for path in (records / kind).rglob("*") if path.is_file()):
            # A long name is cut into folders, each but the last marked by an @.
            encoded = "".join(part.removeprefix("@") for part in record.relative_to(records / kind).parts)
            with contextlib.suppress(ValueError):  # something else than a record
                names.append(base64.urlsafe_b64decode(encoded).decode())
    return names
