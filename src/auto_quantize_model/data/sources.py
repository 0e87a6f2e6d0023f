"""Sources of samples: a JSONL or JSON file, a Parquet file, a folder of images, or a data set of the hub.

In: a path, or the name of a data set. Out: all rows, checked. A row's image is decoded only when the row is drawn.
"""

import codecs
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from datasets.exceptions import DatasetsError

from auto_quantize_model.data.images import images_in, open_picture
from auto_quantize_model.files import InputError, named_path, parse_json, shown
from auto_quantize_model.models import hub
from auto_quantize_model.models.chat_template import TemplateStopped
from auto_quantize_model.models.sample import Sample, Turn

# A stream is shuffled within a buffer: this many rows are fetched for each drawn row, up to the second number.
ROWS_PER_DRAWN = 10
ROWS_AT_MOST = 1000
SHOWN = 20  # problems that one error describes
SHAPE = "each sample is {image?, prompt, answer?} or {messages} with role and content"
PLACEHOLDER = "<image>"  # LLaVA's mark, in a text, for the sample's next image
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
PARQUET_WORDS = ("prompt", "answer", "messages")  # the columns that are read, apart from those of images
IMAGE_KEYS = ("image", "images")
RENAMED = {
    **dict.fromkeys(("text", "question", "query", "instruction", "input", "user"), "prompt"),
    **dict.fromkeys(("output", "response", "completion", "caption", "label", "target", "chosen"), "answer"),
    **dict.fromkeys(("img", "image_path", "image_file", "file_name", "file", "path"), "image"),
    # JSONL files may have a key `conversations`; Parquet files have no such column.
    **dict.fromkeys(("conversation", "conversations", "dialog", "chat"), "messages"),
}
Progress = Callable[[range], Iterable[int]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One sample as its source holds it. `where` names it in errors; an image is a path or the bytes of a file."""

    id: str
    where: str
    prompt: str
    answer: str | None = None
    turns: tuple[Turn, ...] = ()
    images: tuple[Path | bytes, ...] = ()

    def open(self) -> tuple[Sample, str | None]:
        """The sample, and the row's name if only the first frame or page of one of its images is used.

        Raises:
            InputError: an image is missing or unreadable.
        """
        pictures = []
        for number, image in enumerate(self.images, start=1):
            which = f" {number}" if len(self.images) > 1 else ""
            name = f" {shown(image)}" if isinstance(image, Path) else ""
            pictures.append(open_picture(image, f"{self.where}: image{which}{name}"))
        images = tuple(picture.image for picture in pictures)
        sample = Sample(self.id, self.prompt, images, self.answer, self.turns)
        return sample, self.where if any(picture.more_frames for picture in pictures) else None


@dataclass(frozen=True)
class Source:
    """A source of samples: the number of its rows, and a reader of rows by ascending numbers.

    Each value that the reader yields opens one row. A call keeps no image of another row in memory.
    """

    count: int
    read: Callable[[Sequence[int]], Iterator[Callable[[], tuple[Sample, str | None]]]]
    details: dict[str, Any] = field(default_factory=dict)


def every(work: Callable[[Item], Result], items: Iterable[Item], place: str) -> list[Result]:
    """The results of `work` on all items.

    Raises:
        InputError: `work` raised one for some items. The message names all of these items, and describes the first 20.
    """
    results, problems = [], []
    for item in items:
        try:
            results.append(work(item))
        except TemplateStopped:
            raise
        except InputError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        listed = " ".join(f"({number}) {text};" for number, text in enumerate(problems[:SHOWN], start=1))
        rest = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(f"{place}: {len(problems)} samples cannot be used: {listed.removesuffix(';')}{rest}")
    return results


def read_local(path: Path, prompt: str) -> Source:
    """The rows of a local source.

    Args:
        path: a JSONL, JSON or Parquet file, or a folder of images.
        prompt: the question for each image of a folder.

    Raises:
        InputError: the source is missing, of an unknown kind, empty or malformed.
    """
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise InputError(f"calibration.path: {path}: {error}; write the path out") from None
    kinds = "a .jsonl, .json or .parquet file or a folder of images"
    if path.is_dir():
        source = _read_folder(path, prompt)
    elif not path.exists():
        raise InputError(f"calibration.path: {shown(path)} does not exist; give {kinds}")
    elif not path.is_file():
        raise InputError(f"calibration.path: {shown(path)} is neither a regular file nor a folder; give {kinds}")
    elif path.suffix in (".jsonl", ".json"):
        values = _read_lines(path) if path.suffix == ".jsonl" else _read_list(path)
        source = _listed(
            every(lambda numbered: _row(*numbered[1], path, numbered[0]), enumerate(values, 1), shown(path))
        )
    elif path.suffix == ".parquet":
        source = _read_parquet(path)
    else:
        raise InputError(f"calibration.path: {shown(path)} is neither {kinds[2:]}; convert it")
    if not source.count:
        skipped = source.details.get("skipped")
        reason = f" (skipped: {listed(skipped)})" if skipped else ""
        raise InputError(
            f"{shown(path)}: holds no samples{reason}; add some, or set calibration.path to another source"
        )
    return source


def listed(counts: dict[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _open_later(make: Callable[[], Row]) -> tuple[Sample, str | None]:
    return make().open()


def _listed(rows: list[Row]) -> Source:
    return Source(len(rows), lambda numbers: (rows[number].open for number in numbers))


def _numbered(path: Path, number: int) -> str:
    return f"{shown(Path(path.name))}:{number:06d}"


def _read_folder(folder: Path, prompt: str) -> Source:
    """The images in a folder and its subfolders, by name. All other files are counted."""
    images, skipped = images_in(folder)
    prompt, _, turns, _ = asked({"prompt": prompt}, [folder], "calibration.prompt")
    rows = [
        Row(_numbered(folder, number), shown(file), prompt, turns=turns, images=(file,))
        for number, file in enumerate(images, start=1)
    ]
    details = {"skipped": skipped} if skipped else {}
    source = _listed(rows)
    return Source(source.count, source.read, details)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the bytes of each non-empty line of a JSONL."""
    # Split only at newlines: str.splitlines also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield f"{shown(path)}, line {number}", line


def _parsed(data: bytes, where: str) -> Any:
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:  # invalid JSON or UTF-8
        raise InputError(f"{where}: not valid JSON ({error}); correct or remove the line") from None


def _read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the value of each item of a JSON file that is a list."""
    rows = _parsed(path.read_bytes().removeprefix(codecs.BOM_UTF8), shown(path))
    if not isinstance(rows, list):
        raise InputError(f"{shown(path)}: not a JSON list; give a list of samples, or a .jsonl with one on each line")
    for number, row in enumerate(rows, start=1):
        yield f"{shown(path)}, item {number}", row


def _row(where: str, value: Any, path: Path, number: int) -> Row:
    """A line or an item of a JSON file as a row; image paths are relative to the file.

    Raises:
        InputError: the value has another shape.
    """
    value = _parsed(value, where) if isinstance(value, bytes) else value
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; {SHAPE}")
    sample_id, folder = _numbered(path, number), path.parent
    talk = [key for key in ("messages", "conversations") if key in value]
    allowed = {"id", *IMAGE_KEYS, *(talk[:1] or ["prompt", "answer"])}
    if unknown := sorted(set(value) - allowed):
        advice = [] if talk else renamings(unknown, value)
        advice += [f"remove {name!r}" for name in unknown if advice and name not in RENAMED]
        names = ", ".join(map(repr, unknown if advice else unknown[:1]))
        raise InputError(f"{where}: unknown key{'s' * (', ' in names)} {names}; {', '.join(advice) or SHAPE}")
    named = images_of(value)
    prompt, answer, turns, images = conversation(value[talk[0]], named, where) if talk else asked(value, named, where)
    return Row(sample_id, where, prompt, answer, turns, image_paths(images, folder, where))


def renamings(unknown: Sequence[str], there: Iterable[str]) -> list[str]:
    """Advice for keys or columns with common names, so that they can be read; other names get no advice.

    Args:
        unknown: names that are not ours.
        there: all names of the row or table. A name of ours that is already there is not advised again.
    """
    by_ours: dict[str, list[str]] = {}
    for name in unknown:
        if name in RENAMED:
            by_ours.setdefault(RENAMED[name], [RENAMED[name]] if RENAMED[name] in there else []).append(name)
    found = []
    for ours, names in by_ours.items():
        quoted = " and ".join(map(repr, names))
        if len(names) == 1:
            found.append(f"rename {quoted} to {ours!r}")
        elif ours in ("prompt", "answer"):
            found.append(f"write {quoted} as one text under {ours!r}")
        else:
            found.append(f"keep one of {quoted} under {ours!r}")
    return found


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The values under `image` and `images` of a row; each may be a list."""
    found: list[Any] = []
    for key in IMAGE_KEYS:
        value = row.get(key)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def image_paths(images: Sequence[Any], folder: Path, where: str) -> tuple[Path | bytes, ...]:
    """The paths or bytes of a row's images, as `image_path` finds them; an image without either is left out."""
    found = [image_path(image, folder, where) for image in images]
    if None in found and len(found) > 1:
        raise InputError(f"{where}: one of its {len(found)} images is empty; leave it out of the list")
    return tuple(image for image in found if image is not None)


def image_path(image: Any, folder: Path, where: str) -> Path | bytes | None:
    """The path of an image that a source names, relative to `folder`, or the bytes that the source holds.

    Raises:
        InputError: the value is not a path.
    """
    if isinstance(image, dict):
        content = image.get("bytes")
        if isinstance(content, bytes):  # JSON has no bytes: a text would be opened as a path
            return content
        if content:
            raise InputError(f"{where}: 'bytes' of the image are not bytes; save the image as a file and give its path")
        image = image.get("path")
    if image is None:
        return None
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: 'image' is not a path; give one relative to {shown(folder)}, or leave it out")
    try:
        os.fsencode(image)
    except UnicodeEncodeError:
        raise InputError(f"{where}: image {image!a} holds half of a character; write its path whole") from None
    if "://" in image or image.startswith("data:"):
        raise InputError(
            f"{where}: image {image[:60]} is not a path; save the image as a file and give a path relative to"
            f" {shown(folder)}"
        )
    return named_path(image, folder)


def check_words(row: dict[str, Any], where: str) -> None:
    """Refuse a row without a prompt, or with an answer that is not text.

    Raises:
        InputError: the row is such a row.
    """
    prompt, answer = row.get("prompt"), row.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: no text under 'prompt'; {SHAPE}")
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: 'answer' is not text; put it in quotes or leave it out")


def asked(row: dict[str, Any], images: list[Any], where: str) -> tuple[str, str | None, tuple[Turn, ...], list[Any]]:
    """A row's prompt and answer, with its images, as `conversation` returns them.

    Raises:
        InputError: the words are refused by `check_words`, or the prompt has places for another number of images.
    """
    check_words(row, where)
    prompt, answer = row["prompt"], row.get("answer")
    if not images or PLACEHOLDER not in prompt:
        return prompt, answer, (), images
    said = [{"role": "user", "content": prompt}]
    said += [] if answer is None else [{"role": "assistant", "content": answer}]
    return conversation(said, images, where)


def conversation(messages: Any, images: list[Any], where: str) -> tuple[str, str | None, tuple[Turn, ...], list[Any]]:
    """A list of messages as prompt, answer, turns (none where the prompt holds all of them) and references to images.

    Args:
        messages: {role, content} as OpenAI and transformers write them, or {from, value} as ShareGPT and LLaVA write
            them. `content` is text or a list of parts.
        images: those that the sample names, in the order of their places; the messages may name them instead.
        where: the name of the sample in errors.

    Raises:
        InputError: the list is not a conversation of system, user and assistant, or its images have other places.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: not a list of messages; {SHAPE}")
    turns, references = [], []
    for number, message in enumerate(messages, start=1):
        role, parts, found = _turn(message, bool(images), f"{where}, message {number}")
        turns.append((role, parts))
        references += found
    images, placed = _placed(images, references, where), bool(references)
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise InputError(
            f"{where}: roles are {', '.join(roles)}; user and assistant have to take turns, the user first, after at"
            " most one system message"
        )
    answer = None
    if roles[-1] == "assistant":
        answer = "".join(part or "" for part in turns.pop()[1])
    if images and not placed:
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", (*[None] * len(images), *turns[first][1]))
    prompt = "".join(part or "" for part in turns[-1][1])
    if not prompt.strip():
        raise InputError(f"{where}: the last user message has no text; {SHAPE}")
    if turns == [("user", (*[None] * len(images), prompt))]:
        turns = []
    return prompt, answer, tuple(turns), images


def _placed(images: list[Any], references: list[Any], where: str) -> list[Any]:
    """The images in the order of their places, from the sample's list and the references in its messages.

    Raises:
        InputError: there are more or fewer places than images, or both the sample and a message name images.
    """
    named = [reference for reference in references if reference is not None]
    if images and named:
        raise InputError(f"{where}: the sample and its messages both name images; name them in one of the two")
    if images and references and len(images) != len(references):
        raise InputError(
            f"{where}: {len(images)} images and {len(references)} places for them; write a place for each image, or"
            " none"
        )
    if not images and len(named) < len(references):
        raise InputError(f"{where}: a message shows an image that the sample does not name; add the key 'image'")
    return images or named


def _turn(message: Any, has_image: bool, where: str) -> tuple[str, tuple[str | None, ...], list[Any]]:
    """A message's role, its parts, and its references to images: each None where the sample's next image is meant."""
    if not isinstance(message, dict):
        raise InputError(f"{where}: not a JSON object; {SHAPE}")
    keys = ("from", "value") if "from" in message else ("role", "content")
    if unknown := sorted(key for key in set(message) - set(keys) if message[key] is not None):
        raise InputError(f"{where}: the key {unknown[0]!r} is not supported; take it out, or remove the sample")
    role, content = ROLES.get(str(message.get(keys[0]))), message.get(keys[1])
    if role is None:
        raise InputError(
            f"{where}: the role {message.get(keys[0])!r} is not supported; roles are system, user and assistant"
        )
    if isinstance(content, str):
        return role, *_around_placeholder(content, has_image)
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}: no text under {keys[1]!r}; {SHAPE}")
    parts: list[str | None] = []
    references = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in ("image", "image_url") and role == "user":
            reference = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            references.append(reference.get("url") if isinstance(reference, dict) and "url" in reference else reference)
            parts.append(None)
        else:
            raise InputError(
                f"{where}: a part of type {kind!r} is not supported; parts are text, and image in a user's message"
            )
    return role, tuple(parts), references


def _around_placeholder(text: str, has_image: bool) -> tuple[tuple[str | None, ...], list[Any]]:
    """A text as parts: LLaVA writes `<image>` on a line of its own where the sample's image is shown."""
    if not has_image or PLACEHOLDER not in text:
        return (text,), []
    pieces = text.split(PLACEHOLDER)
    parts: list[str | None] = []
    for number, piece in enumerate(pieces):
        piece = piece.removeprefix("\n") if number else piece
        piece = piece.removesuffix("\n") if number < len(pieces) - 1 else piece
        parts += [piece] * bool(piece) + [None] * (number < len(pieces) - 1)
    return tuple(parts), [None] * (len(pieces) - 1)


def _read_parquet(path: Path) -> Source:
    """The rows of a Parquet file. Words are read at once, images by row group, because images take the memory.

    `Dataset.from_parquet` is not used: it caches by path and time, and files unpacked from our archives share a time.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            words = file.read(columns=[name for name in PARQUET_WORDS if name in names]).to_pylist()
            shown_by = [name for name in IMAGE_KEYS if name in names]
            _images_of(file.schema_arrow.empty_table(), shown_by)
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise InputError(f"{shown(path)}: the column {twice[0]!r} is there twice; remove one of the two")
    if not {"prompt", "messages"} & set(names):
        advice = renamings(names, names)
        raise InputError(
            f"{shown(path)}: no column 'prompt'; there are {', '.join(names)}{'; ' * bool(advice)}{', '.join(advice)}"
        )
    rows = every(lambda item: _parquet_row(item[1], path, item[0], bool(shown_by)), enumerate(words, 1), shown(path))

    def read(numbers: Sequence[int]) -> Iterator[Callable[[], tuple[Sample, str | None]]]:
        ends = [sum(groups[: index + 1]) for index in range(len(groups))]
        group: int = -1
        images: Sequence[Mapping[str, Any]] = ()
        for number in numbers:
            at = next(index for index, end in enumerate(ends) if number < end)
            if at != group and shown_by:
                try:
                    with pyarrow.parquet.ParquetFile(path) as file:
                        images = _images_of(file.read_row_group(at, columns=shown_by), shown_by)
                except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
                    raise _unreadable(path, error) from None
                group = at
            of_row = images_of(images[number - ends[at] + groups[at]]) if shown_by else []
            yield functools.partial(_open_later, functools.partial(rows[number], of_row))

    unread = [name for name in names if name not in (*PARQUET_WORDS, *IMAGE_KEYS)]
    return Source(len(rows), read, {"columns_not_read": unread} if unread else {})


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{shown(path)}: not a readable Parquet file of samples ({error}); write it again")


def _images_of(table: pyarrow.Table, names: Sequence[str]) -> Any:
    """Columns of images, or of lists of images, as {bytes, path}; an image may be stored as that, as bytes, or a path.

    Returns:
        A data set, whose rows are {column: image or list of images}.
    """
    found = Dataset(table.select(list(names)))
    for name in names:
        kind = table.schema.field(name).type
        listed = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        image = ImageFeature(decode=False)
        found = found.cast_column(name, ListFeature(image) if listed else image)
    return found


def _parquet_row(row: dict[str, Any], path: Path, number: int, has_images: bool) -> Callable[[list[Any]], Row]:
    """A function that makes a checked row of a Parquet file once its images are read."""
    where, sample_id = f"{shown(path)}, row {number}", _numbered(path, number)
    messages = row.get("messages")
    if messages is None:
        check_words(row, where)
    elif isinstance(messages, str):
        messages = _parsed(messages.encode(), where)

    def finish(named: list[Any]) -> Row:
        prompt, answer, turns, images = (
            asked(row, named, where) if messages is None else conversation(messages, named, where)
        )
        return Row(sample_id, where, prompt, answer, turns, image_paths(images, path.parent, where))

    if not has_images:
        finish([])
    return finish


def stream(
    repo_id: str,
    revision: str,
    split: str,
    columns: dict[str, str | None],
    prompt: str,
    seed: int,
    wanted: int,
    progress: Progress = iter,
) -> Source:
    """Drawn rows of a data set of the hub.

    The data set is streamed. A buffer is filled from ten row groups (Parquet's unit of reading) at a time, in an order
    drawn by the seed. Rows are drawn from the buffer, so only these row groups are fetched.

    Args:
        repo_id: the data set, as owner/name.
        revision: its commit.
        split: its split.
        columns: {our name of a column: the data set's name}.
        prompt: the question where the data set has no column of prompts.
        seed: seed of the draw.
        wanted: the number of rows that are drawn.
        progress: wraps the range of rows while they are fetched.

    Returns:
        A source of `wanted` rows, which are read all at once; if the data set has fewer, reading ends early.

    Raises:
        InputError: raised at reading, if the data set, its revision or its split is missing or cannot be reached. Also
            raised if a column is missing.
    """

    def read(numbers: Sequence[int]) -> Iterator[Callable[[], tuple[Sample, str | None]]]:
        with hub.explained("calibration", repo_id, revision):
            hub.require_commit("dataset", repo_id, revision)
            hub.commit_of("dataset", repo_id, revision)
            try:
                rows = load_dataset(repo_id, split=split, revision=revision, streaming=True)
                _require_columns(repo_id, columns, rows.column_names or list(next(iter(rows))))
                if columns["image"]:
                    image = ImageFeature(decode=False)
                    several = getattr((rows.features or {}).get(columns["image"]), "feature", None)
                    listed = isinstance(several, ImageFeature | dict)
                    rows = rows.cast_column(columns["image"], ListFeature(image) if listed else image)
                buffer = max(min(ROWS_PER_DRAWN * wanted, ROWS_AT_MOST), wanted)
                drawn = rows.reshard().shuffle(seed=seed, buffer_size=buffer).take(wanted)
                for number, row in zip(progress(range(wanted)), drawn, strict=False):
                    make = functools.partial(_hub_row, row, columns, repo_id, split, prompt, number)
                    yield functools.partial(_open_later, make)
            except (ValueError, TypeError, DatasetsError, pyarrow.ArrowException) as error:
                raise InputError(
                    f"{repo_id}: split {split} cannot be read ({error}); check calibration.split and"
                    " calibration.columns"
                ) from None

    return Source(wanted, read, {"hub": {"repo_id": repo_id, "commit": revision, "split": split, "columns": columns}})


def _require_columns(repo_id: str, columns: dict[str, str | None], there: list[str]) -> None:
    for key, column in columns.items():
        if column is not None and column not in there:
            raise InputError(
                f"{repo_id}: no column {column!r} (calibration.columns.{key}); there are {', '.join(there)}"
            )


def _hub_row(
    row: dict[str, Any], columns: dict[str, str | None], repo_id: str, split: str, prompt: str, number: int
) -> Row:
    """A row by our names for its columns; of a list of captions the first is taken."""
    ours: dict[str, Any] = {key: row[column] if column else None for key, column in columns.items()}
    for key in ("prompt", "answer"):
        if isinstance(ours[key], list):
            ours[key] = next(iter(ours[key]), None)
    name = str(ours["id"]) if columns["id"] else f"{number:06d}"
    where = f"{repo_id}, {split}, row {name}"
    if not columns["prompt"]:
        ours["prompt"] = prompt
    asked_prompt, answer, turns, images = asked(ours, images_of({"image": ours["image"]}), where)
    if not all(image and image.get("bytes") for image in images):
        raise InputError(f"{where}: the image column holds no bytes; choose a column of images")
    return Row(f"{split}:{name}", where, asked_prompt, answer, turns, tuple(image["bytes"] for image in images))
