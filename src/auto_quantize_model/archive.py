"""Pack results into a tar file that has the same bytes for the same files, and list the files with their sha256.

In: result files below the current directory. Out: an uncompressed tar, and a JSON document of the checksums.
"""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from auto_quantize_model.files import InputError, atomic_path, read_json, sha256_bytes, sha256_file, write_json

# 1 January 1980, UTC, in seconds: some unpackers refuse times before it.
MEMBER_TIME = 315532800
MEMBER_MODE = 0o644


def archive_results(archive: Path, checksums: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Pack `files` into `archive` and write their checksums. Both files are written whole or not at all.

    Only names and contents reach the tar: members are sorted, and times, owners and modes are fixed. The tar is not
    compressed, because the bytes of a compressor differ between its versions.

    Args:
        archive: the tar file to write.
        checksums: the JSON document to write.
        files: regular files below the current directory, or folders of such; each file keeps its relative path.

    Returns:
        {archive, bytes, sha256, files: [{name, bytes, sha256}]}, as written to `checksums`.

    Raises:
        InputError: there are no files, or a file is missing, is not a regular file, lies outside the current directory
            or is named twice.
    """
    members = _members(files)
    entries = []
    with atomic_path(archive) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, path in members:
                content = path.read_bytes()
                tar.addfile(_header(name, len(content)), io.BytesIO(content))
                entries.append({"name": name, "bytes": len(content), "sha256": sha256_bytes(content)})
        document = {
            "archive": archive.name,
            "bytes": temporary.stat().st_size,
            "sha256": sha256_file(temporary),
            "files": entries,
        }
    write_json(checksums, document)
    return document


def why_outdated(checksums: Path, files: Iterable[Path] = ()) -> str:
    """Which file the archive lacks or holds with other content, in words; empty if there is no such file.

    Args:
        checksums: as `archive_results` writes them; without them there is nothing to compare.
        files: files that the archive must hold, below the current directory and relative to it. The archive's name is
            not enough: model `a-b` with set `c` and model `a` with set `b-c` have the same name.
    """
    try:
        entries = {entry["name"]: entry["sha256"] for entry in read_json(checksums)["files"]}
    except (InputError, TypeError, KeyError):
        return ""
    for path in files:
        if path.as_posix() not in entries:
            return f"{checksums} does not list {path}"
    for name, digest in entries.items():
        if Path(name).is_file() and sha256_file(Path(name)) != digest:
            return f"{checksums} is of another {name}"
    return ""


def _members(files: Iterable[Path]) -> list[tuple[str, Path]]:
    """Names in the archive with their files, checked and sorted."""
    root = Path.cwd()
    members: dict[str, Path] = {}
    for path in (inner for named in files for inner in _files_of(named)):
        # Not resolved: a link keeps its own name, and the archive holds the file that the link points to.
        name = PurePosixPath(root / path)
        if not name.is_relative_to(root.as_posix()) or ".." in name.parts:
            raise InputError(f"{path}: outside {root}, so without a name in the archive; run from a folder above it")
        if not path.is_file():
            raise InputError(f"{path}: no such file; run the rule that makes it, or leave it out")
        relative = name.relative_to(root.as_posix()).as_posix()
        if relative in members:
            raise InputError(f"{path}: named twice; leave one out")
        members[relative] = path
    if not members:
        raise InputError("no files to archive; name at least one")
    return sorted(members.items())


def _files_of(path: Path) -> list[Path]:
    """The files of a folder, at any depth, or the path itself."""
    return [inner for inner in path.rglob("*") if not inner.is_dir()] if path.is_dir() else [path]


def _header(name: str, size: int) -> tarfile.TarInfo:
    """The header of a member, without anything that could differ between two machines or two days."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.mtime = MEMBER_TIME
    header.mode = MEMBER_MODE
    header.uid = header.gid = 0
    header.uname = header.gname = ""
    return header
