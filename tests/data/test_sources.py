"""Sources of samples: the shapes of rows that are common, what a folder skips, and all bad samples in one error."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from auto_quantize_model.data.sources import every, read_local
from auto_quantize_model.files import InputError
from auto_quantize_model.models.sample import Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 30), (255, 0, 0)).save(tmp_path / "a.png")
    return tmp_path


def read(path: Path) -> list[Sample]:
    """All samples of a source."""
    source = read_local(path, "Describe it.")
    return [open_row()[0] for open_row in source.read(range(source.count))]


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(sample: Sample) -> list[Any]:
    """The turns of a sample, its answer, and whether it has an image."""
    return [*sample.before_answer, sample.answer, bool(sample.images)]


USER = {"role": "user", "content": "What?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
PART = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "What?", "answer": "A cat."}, [("user", ("What?",)), "A cat.", False]),
        ({"id": 7, "image": "a.png", "prompt": "What?"}, [("user", (None, "What?")), None, True]),
        ({"images": ["a.png"], "prompt": "What?"}, [("user", (None, "What?")), None, True]),
        ({"images": [], "prompt": "What?"}, [("user", ("What?",)), None, False]),
        ({"images": ["a.png", "a.png"], "prompt": "What?"}, [("user", (None, None, "What?")), None, True]),
        (
            {"images": ["a.png", "a.png"], "prompt": "<image>\nAnd <image>What?"},
            [("user", (None, "And ", None, "What?")), None, True],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, PART] * 2}]},
            [("user", (None, "What?", None, "What?")), None, True],
        ),
        ({"messages": [USER]}, [("user", ("What?",)), None, False]),
        ({"messages": [USER, ASSISTANT]}, [("user", ("What?",)), "A cat.", False]),
        ({"messages": [USER, ASSISTANT], "image": "a.png"}, [("user", (None, "What?")), "A cat.", True]),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER]},
            [
                ("system", ("Be brief.",)),
                ("user", ("What?",)),
                ("assistant", ("A cat.",)),
                ("user", ("What?",)),
                None,
                False,
            ],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, PART]}]},
            [("user", (None, "What?")), None, True],
        ),
        (
            {"messages": [{"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "a.png"}}]}]},
            [("user", ("What?", None)), None, True],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, PART]}, ASSISTANT], "images": ["a.png"]},
            [("user", (None, "What?")), "A cat.", True],
        ),
        (
            {"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
            [("user", (None, "What?")), None, True],
        ),
        (
            {
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "What?\n<image>"},
                    {"from": "gpt", "value": "A cat."},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": "Yes."},
                ],
            },
            [("user", ("What?", None)), ("assistant", ("A cat.",)), ("user", ("Sure?",)), "Yes.", True],
        ),
        (
            {"image": "a.png", "prompt": "<image>\nWhat?", "answer": "A cat."},
            [("user", (None, "What?")), "A cat.", True],
        ),
        (
            {"image": "a.png", "prompt": "What is <image> here?"},
            [("user", ("What is ", None, " here?")), None, True],
        ),
        ({"prompt": "a <image> b"}, [("user", ("a <image> b",)), None, False]),
        (
            {"conversations": [{"from": "user", "value": "a <image> b"}]},
            [("user", ("a <image> b",)), None, False],
        ),
    ],
)
def test_common_shapes_of_a_row_are_read(folder: Path, row: dict[str, Any], expected: list[Any]) -> None:
    (sample,) = read(lines(folder, row))
    assert said(sample) == expected
    (same,) = read_list(folder, row)
    assert said(same) == expected


def read_list(folder: Path, *rows: Any) -> list[Sample]:
    (folder / "set.json").write_text(json.dumps(rows))
    return read(folder / "set.json")


def test_a_conversation_in_a_parquet_is_read_as_a_list_or_as_json(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    for column in (messages, json.dumps(messages)):
        table = pyarrow.table({"messages": [column], "image": [{"bytes": data, "path": None}]})
        pyarrow.parquet.write_table(table, folder / "set.parquet")
        (sample,) = read(folder / "set.parquet")
        assert said(sample) == [("user", (None, "What?")), "A cat.", True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "unknown key 'question'; rename 'question' to 'prompt'"),
        ({"text": "x"}, "unknown key 'text'; rename 'text' to 'prompt'"),
        (
            {"instruction": "x", "output": "y"},
            "unknown keys 'instruction', 'output'; rename 'instruction' to 'prompt', rename 'output' to 'answer'",
        ),
        (
            {"instruction": "x", "input": "", "output": "y", "source": "z"},
            "write 'input' and 'instruction' as one text under 'prompt', rename 'output' to 'answer', remove 'source'",
        ),
        ({"prompt": "x", "input": "y"}, "write 'prompt' and 'input' as one text under 'prompt'"),
        ({"prompt": "x", "file_name": "y", "path": "z"}, "keep one of 'file_name' and 'path' under 'image'"),
        ({"prompt": "x", "response": "y"}, "rename 'response' to 'answer'"),
        ({"prompt": "x", "file_name": "y"}, "rename 'file_name' to 'image'"),
        ({"prompt": "x", "image": "https://host/a.png"}, "image https://host/a.png is not a path; save the image"),
        ({"prompt": "x", "image": "data:image/png;base64,AAAA"}, "image data:image/png;base64,AAAA is not a path"),
        ({"prompt": "x", "image": "file:///a.png"}, "is not a path"),
        ({"prompt": "x", "image": ""}, "'image' is not a path"),
        ({"prompt": "x", "image": {"bytes": "a.png"}}, "'bytes' of the image are not bytes"),
        ({"prompt": "x", "image": "\ud800.png"}, r"image '\\ud800\.png' holds half of a character"),
        ({"prompt": "<image><image>x", "image": "a.png"}, "1 images and 2 places for them; write a place for each"),
        ({"prompt": "<image>x", "images": ["a.png", "a.png"]}, "2 images and 1 places for them"),
        ({"prompt": "x", "images": ["a.png", {"path": None}]}, "one of its 2 images is empty"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": "x"}, "not a list of messages"),
        ({"messages": ["x"]}, "message 1: not a JSON object"),
        ({"messages": [ASSISTANT]}, "roles are assistant; user and assistant have to take turns"),
        ({"messages": [USER, USER]}, "roles are user, user; user and assistant have to take turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1: the role 'tool' is not supported"),
        ({"messages": [USER | {"tool_calls": [1]}]}, "message 1: the key 'tool_calls' is not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: no text under 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, PART]}]},
            "the sample does not name",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, PART]}], "image": "a.png"},
            "the sample and its messages both name images",
        ),
        ({"messages": [USER], "prompt": "x"}, "unknown key 'prompt'"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>x"}]}, "1 images and 2 places"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}, "last user message has no text"),
    ],
)
def test_another_shape_is_refused_with_what_to_do(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"set\.jsonl, line 1\W.*{message}"):
        read(lines(folder, row))


def test_a_json_file_has_to_be_a_list(folder: Path) -> None:
    (folder / "set.json").write_text('{"prompt": "x"}')
    with pytest.raises(InputError, match=r"set\.json: not a JSON list; give a list of samples, or a \.jsonl"):
        read(folder / "set.json")


def test_a_key_that_a_row_has_twice_is_named_with_its_line(folder: Path) -> None:
    row = '{"prompt": "x", "answer": "y", "answer": "z"}'
    (folder / "set.jsonl").write_text(f'{{"prompt": "x"}}\n{row}\n')
    with pytest.raises(InputError, match=r"set\.jsonl, line 2: .*the key 'answer' is there twice"):
        read(folder / "set.jsonl")
    (folder / "set.json").write_text(f"[{row}]")
    with pytest.raises(InputError, match=r"set\.json: .*the key 'answer' is there twice"):
        read(folder / "set.json")


def test_json_of_a_hundred_thousand_brackets_is_named(folder: Path) -> None:
    (folder / "set.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="line 1: not valid JSON"):
        read(folder / "set.jsonl")


def test_all_bad_lines_are_named_in_one_error(folder: Path) -> None:
    path = lines(folder, {"prompt": "x"}, {"prompt": 1}, {"promt": "x"}, {"prompt": "x", "answer": 1})
    with pytest.raises(InputError, match=r"3 samples cannot be used: \(1\) .*line 2.* \(2\) .*line 3.* \(3\) .*line 4"):
        read(path)


def test_one_error_spells_out_twenty_samples_and_counts_the_rest() -> None:
    def refuse(number: int) -> None:
        raise InputError(f"sample {number}: bad")

    with pytest.raises(InputError) as caught:
        every(refuse, range(23), "set")
    message = str(caught.value)
    assert message.startswith("set: 23 samples cannot be used: (1) sample 0: bad; (2) sample 1: bad;")
    assert message.endswith("(20) sample 19: bad and 3 more")


def test_a_folder_is_read_with_those_in_it_and_what_is_skipped_is_counted(folder: Path) -> None:
    for name in ("b.GIF", "c.tif", "d.jfif", "e.avif"):
        kind = {"d.jfif": "JPEG"}.get(name)
        Image.new("RGB", (60, 30)).save(folder / name, kind)
    for name in ("x.heic", "y.txt", "z.txt", "README", ".DS_Store", "._a.png", "inner/.hidden/a.png", "inner/{a}*.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    (folder / "elsewhere").symlink_to(folder / "inner")
    source = read_local(folder, "Describe it.")
    assert source.count == 6
    assert [open_row()[0].prompt for open_row in source.read(range(6))] == ["Describe it."] * 6
    assert source.details == {
        "skipped": {
            ".heic": 1,
            ".txt": 2,
            "hidden": 2,
            "hidden folders": 1,
            "links to folders": 1,
            "without a suffix": 1,
        }
    }


def test_the_prompt_of_a_folder_says_where_its_image_stands(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (open_row,) = read_local(tmp_path, "What is <image> here?").read([0])
    assert said(open_row()[0]) == [("user", ("What is ", None, " here?")), None, True]


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError, match=r"holds no samples \(skipped: 1 \.heic\)"):
        read(tmp_path)


def test_a_file_name_that_is_no_utf_8_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert "\\xff.png" in str(caught.value).encode().decode()


def test_paths_may_be_absolute_or_begin_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "inner").mkdir()
    path = lines(folder / "inner", *({"prompt": "x", "image": image} for image in (str(folder / "a.png"), "~/a.png")))
    assert [sample.images[0].size for sample in read(path) if sample.images] == [(60, 30)] * 2
    assert len(read(Path("~/inner/set.jsonl"))) == 2
    with pytest.raises(InputError, match="calibration.path: ~nobody-of-that-name/a.jsonl: .*write the path out"):
        read(Path("~nobody-of-that-name/a.jsonl"))


def test_a_source_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.jsonl")
    with pytest.raises(InputError, match="is neither a regular file nor a folder"):
        read(tmp_path / "set.jsonl")


def test_images_of_a_parquet_are_read_by_row_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / "a.png").read_bytes()
    rows = {"prompt": [f"{number}" for number in range(6)], "image": [data] * 6}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "set.parquet", row_group_size=2)
    groups = []
    read_row_group = pyarrow.parquet.ParquetFile.read_row_group

    def recorded(self: Any, number: int, **options: Any) -> Any:
        groups.append(number)
        return read_row_group(self, number, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", recorded)
    source = read_local(folder / "set.parquet", "")
    assert groups == []
    samples = [open_row()[0] for open_row in source.read([1, 4, 5])]
    assert [sample.prompt for sample in samples] == ["1", "4", "5"]
    assert all(bool(sample.images) and sample.images[0].size == (60, 30) for sample in samples)
    assert groups == [0, 2]


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("stored", ["bytes", "path", "both"])
def test_a_parquet_column_of_lists_gives_several_images(folder: Path, name: str, stored: str) -> None:
    data = (folder / "a.png").read_bytes()
    Image.new("RGB", (10, 20)).save(folder / "b.png")
    kinds: dict[str, list[Any]] = {
        "bytes": [data, (folder / "b.png").read_bytes()],
        "path": ["a.png", "b.png"],
        "both": [{"bytes": data, "path": None}, {"bytes": None, "path": "b.png"}],
    }
    rows = {"prompt": ["1", "<image>x<image>", "3"], name: [[], kinds[stored], kinds[stored][:1]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "set.parquet", row_group_size=2)
    samples = read(folder / "set.parquet")
    assert [[image.size for image in sample.images] for sample in samples] == [[], [(60, 30), (10, 20)], [(60, 30)]]
    assert said(samples[1])[0] == ("user", (None, "x", None))


def test_the_place_of_each_of_several_images_is_kept_and_a_missing_one_is_named(folder: Path) -> None:
    Image.new("RGB", (10, 20)).save(folder / "b.png")
    parts = [{"type": "image", "image": "b.png"}, PART, {"type": "image", "image": "a.png"}]
    (sample,) = read(lines(folder, {"messages": [{"role": "user", "content": parts}]}))
    assert [image.size for image in sample.images] == [(10, 20), (60, 30)]
    assert sample.turns == (("user", (None, "What?", None)),)
    (open_row,) = read_local(lines(folder, {"prompt": "x", "images": ["a.png", "gone.png"]}), "").read([0])
    with pytest.raises(InputError, match=r"line 1: image 2 .*gone\.png does not exist"):
        open_row()


def test_a_parquet_column_under_another_name_is_told(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"question": ["x"]}), folder / "set.parquet")
    with pytest.raises(InputError, match="no column 'prompt'; there are question; rename 'question' to 'prompt'"):
        read(folder / "set.parquet")
    talk = pyarrow.table({"conversations": [[{"from": "human", "value": "x"}]]})
    pyarrow.parquet.write_table(talk, folder / "set.parquet")
    with pytest.raises(InputError, match="there are conversations; rename 'conversations' to 'messages'"):
        read(folder / "set.parquet")


def test_a_parquet_column_that_is_there_twice_is_refused(folder: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, folder / "set.parquet")
    with pytest.raises(InputError, match="the column 'prompt' is there twice"):
        read(folder / "set.parquet")
