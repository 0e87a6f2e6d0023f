"""Files in and out: hashes, atomic writes, canonical JSON, config blocks, and the error that is the user's to mend."""

import difflib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

Spec = TypeVar("Spec")


class InputError(Exception):
    """Something the user gave is wrong: the message names the thing, the place and the next step."""


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of the file at `path`, as 64 hexadecimal digits; read in pieces, so any size fits in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(document: Any) -> str:
    """`document` as JSON text that is the same bytes for the same values.

    Raises:
        ValueError: it holds NaN or infinity, which JSON cannot say.
    """
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return sha256_bytes(json.dumps(document, sort_keys=True, allow_nan=False).encode())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place on success, remove it on any exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private to its owner; a result is as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path` as canonical JSON, whole or not at all."""
    write_text(path, canonical_json(document))


def read_json(path: Path) -> Any:
    """The JSON document at `path`.

    Raises:
        InputError: there is no such file, or it is not JSON; NaN, infinity and numbers too large for float64 are none.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, parse_float=finite)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, where a JSON file is asked for") from None
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets, thousands deep
        raise InputError(f"{path}: not valid JSON ({error}); restore the file") from None


def no_such_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not one of those `known`: the nearest of them, or all of them."""
    near = difflib.get_close_matches(key, known := list(known), 1)
    return f"no such key; did you mean {near[0]}?" if near else f"no such key; the keys are {', '.join(known)}"


def from_block(spec: type[Spec], block: dict[str, Any], name: str) -> Spec:
    """A dataclass from the block `name` of a config.

    Raises:
        InputError: a key is unknown or missing, or the dataclass refuses a value.
    """
    known = {field.name: field for field in fields(spec)}  # type: ignore[arg-type]
    if not isinstance(block, dict):
        raise InputError(f"{name}: no JSON object; write {{key: value}}")
    if unknown := sorted(set(block) - set(known)):
        raise InputError(f"{name}.{unknown[0]}: {no_such_key(unknown[0], known)}")
    required = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if missing := [key for key in required if key not in block]:
        raise InputError(f"{name}.{missing[0]}: not set; add it")
    hints = get_type_hints(spec)
    for key, value in block.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}.{key}: {value} is not finite; write a finite number")
        if not _is_of(value, hints[key]):
            raise InputError(f"{name}.{key}: {value!r:.60} is not {_in_words(hints[key])}; correct the value")
    return spec(**block)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a dataclass field's type: a plain type, a union of them, a sequence or a dict."""
    if isinstance(hint, UnionType):
        return any(_is_of(value, choice) for choice in get_args(hint))
    kind = get_origin(hint) or hint
    if kind is Sequence:
        return isinstance(value, list)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _in_words(hint: Any) -> str:
    """The type of a dataclass field, in words."""
    if isinstance(hint, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
    return words.get(get_origin(hint) or hint, "null" if hint is NoneType else "a list")
