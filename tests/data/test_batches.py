"""Calibration sets: drawn by a seed, disjoint, stored as they are, and refused where they are wrong."""

import copy
import json
import os
import tempfile
import weakref
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from build import a_model_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from auto_quantize_model.config import CalibrationSpec
from auto_quantize_model.data import sources
from auto_quantize_model.data.batches import (
    batches_of,
    extract,
    extract_into,
    load_batches,
    load_heldout,
    read_samples,
    remarks,
    write_samples,
)
from auto_quantize_model.data.digits import digit_samples, digits_split, varied_samples
from auto_quantize_model.data.local_sources import samples_digest
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.loader import CalibrationLoader
from auto_quantize_model.models.chat_template import renderer
from auto_quantize_model.models.encode import prepare, tensors
from auto_quantize_model.models.sample import Limits
from auto_quantize_model.records import Answers

SPEC = CalibrationSpec(
    name="set",
    source="digits",
    num_samples=4,
    num_heldout=2,
    seed=0,
    batch_size=2,
    min_pixels=3136,
    max_pixels=3136,
    max_tokens=64,
)
LIMITS = Limits(SPEC.min_pixels, SPEC.max_pixels, SPEC.max_tokens)
UNTRAINED = a_model_manifest()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    rows = []
    for sample in digit_samples(range(6)):
        sample.images[0].save(tmp_path / f"{sample.id}.png")
        rows.append({"image": f"{sample.id}.png", "prompt": sample.prompt, "answer": sample.answer})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def local(path: Path, **changes: object) -> CalibrationSpec:
    return SPEC.model_copy(update={"source": "local", "path": str(path), **changes})


@given(st.integers(min_value=0, max_value=2**32 - 1))
@settings(max_examples=25)
def test_digit_splits_are_disjoint_and_complete(seed):
    split = digits_split(seed)
    assert sorted(index for indices in split.values() for index in indices) == list(range(1797))
    assert digits_split(seed) == split


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 6))
@settings(max_examples=15, deadline=None)
def test_local_splits_are_disjoint_exact_and_the_same_for_a_seed(processor, seed, num_samples, num_heldout):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "set.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"word {number}"}) + "\n" for number in range(12)))
        spec = local(path, num_samples=num_samples, num_heldout=num_heldout, seed=seed, batch_size=1)
        first, second = (extract(spec, processor, UNTRAINED) for _ in range(2))
    calibration, heldout, _ = first
    assert len({item.sample.prompt for item in calibration + heldout}) == num_samples + num_heldout
    assert len(calibration) == num_samples
    assert first == second


def test_digits_come_from_the_splits_that_training_left_aside(processor):
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    split = digits_split(0)
    for samples, name in ((calibration, "calibration"), (heldout, "heldout")):
        assert {int(item.sample.id.removeprefix("digit-")) for item in samples} <= set(split[name])
    assert not manifest.text_only
    assert all(entry.image_tokens == 4 for entry in manifest.samples["calibration"])


def test_the_same_seed_draws_the_same_set_and_another_seed_another(processor):
    manifests = [extract(SPEC.model_copy(update={"seed": seed}), processor, UNTRAINED)[2] for seed in (0, 0, 1)]
    assert manifests[0] == manifests[1]
    assert manifests[0].digest != manifests[2].digest


def test_stored_samples_come_back_bit_for_bit(processor, tmp_path):
    calibration, _, manifest = extract(SPEC, processor, UNTRAINED)
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.parquet", calibration)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    restored = read_samples(tmp_path / "a.parquet")
    assert [item.sample.images[0].tobytes() for item in restored] == [
        item.sample.images[0].tobytes() for item in calibration
    ]
    assert [replace(item, sample=None) for item in restored] == [replace(item, sample=None) for item in calibration]
    batches = load_batches(tmp_path / "a.parquet", manifest, processor)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2]
    assert batches[0]["pixel_values"].dtype == torch.float32


def test_several_images_of_a_sample_come_back_in_their_places(processor, jsonl, tmp_path):
    names = [f"digit-{number:04d}.png" for number in range(3)]
    turns = [
        {"role": "user", "content": "<image>One and <image>two?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And <image>?"},
    ]
    rows = [{"messages": turns, "images": names}, {"prompt": "Both?", "images": names[:2]}, {"prompt": "What?"}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = local(jsonl, num_samples=3, num_heldout=0, batch_size=1, max_tokens=200)
    samples, _, manifest = extract(spec, processor, UNTRAINED)
    assert sorted(entry.image_tokens for entry in manifest.samples["calibration"]) == [0, 8, 12]
    write_samples(tmp_path / "set.parquet", samples)
    restored = read_samples(tmp_path / "set.parquet")
    assert [item.sample.turns for item in restored] == [item.sample.turns for item in samples]
    for batch, item in zip(load_batches(tmp_path / "set.parquet", manifest, processor), samples, strict=True):
        expected = tensors(item, processor)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
        assert len(batch.get("image_grid_thw", ())) == len(item.sample.images)


def test_a_set_that_is_not_its_manifests_is_refused(processor, tmp_path):
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    write_samples(tmp_path / "set.parquet", heldout)
    with pytest.raises(InputError, match="not the samples of its manifest"):
        load_batches(tmp_path / "set.parquet", manifest, processor)


def test_jsonl_folder_and_parquet_give_the_same_images(processor, jsonl, tmp_path):
    spec = local(jsonl)
    from_jsonl, heldout, _ = extract(spec, processor, UNTRAINED)
    assert not {item.sample.id for item in from_jsonl} & {item.sample.id for item in heldout}
    from_folder, _, _ = extract(local(tmp_path), processor, UNTRAINED)
    stored = tmp_path / "stored.parquet"
    render = renderer(processor.tokenizer)
    write_samples(stored, [prepare(sample, processor, LIMITS, render) for sample in digit_samples(range(6))])
    from_parquet, _, _ = extract(local(stored), processor, UNTRAINED)
    pixels = [
        [item.sample.images[0].tobytes() for item in samples] for samples in (from_jsonl, from_folder, from_parquet)
    ]
    assert pixels[0] == pixels[1] == pixels[2]
    assert {item.sample.prompt for item in from_folder} == {"Describe this image."}


def test_text_only_samples_are_allowed_and_marked(processor, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {number}"}) + "\n" for number in range(3)))
    _, _, manifest = extract(local(path, num_samples=2, num_heldout=0, batch_size=1), processor, UNTRAINED)
    assert manifest.text_only


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7: not valid JSON"),
        ('{"image": "digit-0000.png"}', "line 7: no text under 'prompt'"),
        ('{"prompt": "x", "imgae": "a.png"}', "line 7: unknown key 'imgae'"),
    ],
)
def test_malformed_lines_are_named(processor, jsonl, line, message):
    jsonl.write_text(jsonl.read_text() + line + "\n")
    with pytest.raises(InputError, match=message):
        extract(local(jsonl), processor, UNTRAINED)


def test_missing_and_unreadable_images_are_named(processor, jsonl, tmp_path):
    for image in tmp_path.glob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"line \d: image .*png cannot be read"):
        extract(local(jsonl), processor, UNTRAINED)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    with pytest.raises(InputError, match=r"line \d: image .*png does not exist"):
        extract(local(jsonl), processor, UNTRAINED)


def test_an_empty_source_is_refused(processor, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no samples"):
        extract(local(tmp_path / "empty.jsonl"), processor, UNTRAINED)


def test_an_unknown_kind_and_a_missing_file_are_refused(processor, tmp_path):
    (tmp_path / "set.csv").write_text("prompt\n")
    with pytest.raises(InputError, match=r"set\.csv is neither"):
        extract(local(tmp_path / "set.csv"), processor, UNTRAINED)
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        extract(local(tmp_path / "gone.jsonl"), processor, UNTRAINED)


def test_fewer_samples_than_asked_are_refused(processor, jsonl):
    with pytest.raises(InputError, match="6 samples left for the calibration split, 7 asked"):
        extract(local(jsonl, num_samples=7), processor, UNTRAINED)
    with pytest.raises(InputError, match="2 samples left for the heldout split, 3 asked"):
        extract(local(jsonl, num_heldout=3), processor, UNTRAINED)


def test_a_sample_over_the_token_limit_is_refused(processor):
    with pytest.raises(InputError, match="24 tokens, over the limit of 23"):
        extract(SPEC.model_copy(update={"max_tokens": 23}), processor, UNTRAINED)


def test_samples_of_different_length_do_not_share_a_batch(processor, jsonl):
    lines = jsonl.read_text().splitlines()
    row = json.loads(lines[0]) | {"prompt": "A much longer question than the others: which digit is this?"}
    jsonl.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(InputError, match=r"Set calibration\.batch_size to 1"):
        extract(local(jsonl, num_samples=6, num_heldout=0), processor, UNTRAINED)
    sizes = {"batch_size": 1, "heldout_batch_size": 5}
    with pytest.raises(InputError, match="and calibration.heldout_batch_size too"):
        extract(local(jsonl, num_samples=1, num_heldout=5, seed=1, **sizes), processor, UNTRAINED)


def test_held_out_batches_have_a_size_of_their_own(processor, tmp_path):
    spec = SPEC.model_copy(update={"num_heldout": 6, "heldout_batch_size": 3})
    _, heldout, manifest = extract(spec, processor, UNTRAINED)
    write_samples(tmp_path / "heldout.parquet", heldout)
    batches, answers = load_heldout(tmp_path / "heldout.parquet", manifest, processor, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3] and [len(spans) for spans in answers] == [3, 3]
    assert (manifest.batch_size, extract(SPEC, processor, UNTRAINED)[2].heldout_batch_size) == (2, 2)


def test_a_digit_is_turned_and_shifted_in_the_same_way_whatever_the_others_are():
    alone, together = varied_samples([7])[0], varied_samples([3, 7])[1]
    assert alone.images[0].tobytes() == together.images[0].tobytes() and alone.answer == together.answer
    assert alone.images[0].tobytes() != digit_samples([7])[0].images[0].tobytes()


def test_the_image_token_in_a_prompt_is_refused(processor, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "<|image_pad|>"}) + "\n")
    with pytest.raises(InputError, match=r"contains the special token <\|image_pad\|>"):
        extract(local(path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 7: not a JSON object"),
        ('{"prompt": " "}', "line 7: no text under 'prompt'"),
        ('{"prompt": "x", "image": 5}', "line 7: 'image' is not a path"),
        ('{"prompt": "x", "answer": 5}', "line 7: 'answer' is not text"),
        ('{"prompt": "\udce9"}', "line 7: not valid JSON .*can't decode byte 0xe9"),
    ],
)
def test_values_of_the_wrong_kind_are_named(processor, jsonl, line, message):
    jsonl.write_bytes(jsonl.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match=message):
        extract(local(jsonl), processor, UNTRAINED)


def test_a_byte_order_mark_and_unicode_line_separators_are_text(processor, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False), encoding="utf-8-sig")
    (item,), _, _ = extract(local(path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)
    assert item.sample.prompt == "one\u2028two"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "not a readable Parquet file"),
        ({"text": ["x"]}, "no column 'prompt'; there are text"),
        ({"prompt": pyarrow.array([], pyarrow.string())}, "holds no samples"),
        ({"prompt": ["x", None]}, "row 2: no text under 'prompt'"),
        ({"prompt": ["x"], "answer": [3]}, "row 1: 'answer' is not text"),
        ({"prompt": ["x"], "image": [3]}, "not a readable Parquet file"),
        ({"prompt": ["x"], "image": ["gone.png"]}, r"row 1: image .*gone\.png does not exist"),
    ],
)
def test_bad_parquet_is_refused(processor, tmp_path, columns, message):
    path = tmp_path / "set.parquet"
    if columns is None:
        path.write_bytes(b"no Parquet")
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(InputError, match=message):
        extract(local(path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)


def test_a_parquet_file_is_read_anew_though_path_and_time_are_the_same(processor, tmp_path):
    path = tmp_path / "set.parquet"
    for index in (0, 1):
        sample = digit_samples([index])[0]
        write_samples(path, [prepare(sample, processor, LIMITS, renderer(processor.tokenizer))])
        os.utime(path, (0, 0))
        assert read_samples(path)[0].sample.id == f"digit-{index:04d}"


def test_images_in_a_parquet_lie_relative_to_it(processor, tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "image": ["a.png"]}), tmp_path / "set.parquet")
    spec = local(tmp_path / "set.parquet", num_samples=1, num_heldout=0, batch_size=1, max_pixels=12544)
    assert extract(spec, processor, UNTRAINED)[0][0].sample.images[0].size == (84, 56)


def test_a_photo_is_turned_as_its_exif_says(processor, tmp_path):
    photo = Image.new("RGB", (60, 30))
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    photo.save(tmp_path / "photo.jpg", exif=exif)
    spec = local(tmp_path, num_samples=1, num_heldout=0, batch_size=1, max_pixels=12544)
    assert extract(spec, processor, UNTRAINED)[0][0].sample.images[0].size == (56, 84)


def test_an_image_that_the_processor_refuses_is_named(processor, tmp_path):
    Image.new("RGB", (3000, 5)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="sample .*000001: the model's processor refuses it .*aspect ratio"):
        extract(local(tmp_path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)


def test_an_image_of_absurd_size_is_named(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (60, 30)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png has too many pixels .*decompression bomb"):
        extract(local(tmp_path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)


def test_one_sample_in_both_splits_is_refused(processor, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "x"}\n' * 2)
    with pytest.raises(InputError, match="the calibration sample .* and the held-out sample .* are the same"):
        extract(local(path, num_samples=1, num_heldout=1, batch_size=1), processor, UNTRAINED)


def test_inc_can_iterate_the_loader_again_and_again(processor):
    calibration, _, manifest = extract(SPEC, processor, UNTRAINED)
    loader = CalibrationLoader(batches_of(calibration, manifest.batch_size, processor))
    assert loader.batch_size == 2
    assert [label for _ in range(2) for _, label in loader] == [None] * 4


def test_a_template_with_a_date_is_rendered_once(processor, tmp_path, monkeypatch):
    """Llama 3's template writes today's date; a run over midnight has to measure what was extracted."""
    dated = copy.deepcopy(processor.tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + dated.chat_template
    processor = replace(processor, tokenizer=dated)
    on_the_day(monkeypatch, 2024, 7, 26)
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    write_samples(tmp_path / "calibration.parquet", calibration)
    write_samples(tmp_path / "heldout.parquet", heldout)
    extracted = batches_of(calibration, manifest.batch_size, processor)
    on_the_day(monkeypatch, 2025, 12, 31)
    loaded = load_batches(tmp_path / "calibration.parquet", manifest, processor)
    held, answers = load_heldout(tmp_path / "heldout.parquet", manifest, processor, 1)
    for batch, before in zip(
        loaded + held, extracted + batches_of(heldout, manifest.heldout_batch_size, processor), strict=True
    ):
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], before[name]) for name in batch)
        assert dated.decode(batch["input_ids"][0]).startswith("26 Jul 2024<")
    assert answers == [[item.answer_span for item in heldout]]
    next_day = extract(SPEC, processor, UNTRAINED)[2]
    assert next_day.digest != manifest.digest
    assert dated.decode(extract(SPEC, processor, UNTRAINED)[0][0].input_ids).startswith("31 Dec 2025<")


def on_the_day(monkeypatch, *date):
    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(*date)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def test_no_later_step_renders_or_tokenizes(processor, tmp_path):
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    write_samples(tmp_path / "set.parquet", heldout)
    without_words = replace(processor, tokenizer=None)
    load_heldout(tmp_path / "set.parquet", manifest, without_words, 1)
    batches_of(calibration, manifest.batch_size, without_words)


def test_changed_token_ids_and_answers_are_not_the_manifests(processor, tmp_path):
    calibration, _, manifest = extract(SPEC, processor, UNTRAINED)
    first = calibration[0]
    for changed in (
        replace(first, input_ids=(0, *first.input_ids[1:])),
        replace(first, answer_span=range(1, 2)),
        replace(first, answer_span=None),
    ):
        write_samples(tmp_path / "set.parquet", [changed, *calibration[1:]])
        with pytest.raises(InputError, match="not the samples of its manifest"):
            load_batches(tmp_path / "set.parquet", manifest, processor)


@pytest.mark.parametrize("damage", ["cut", "other columns"])
def test_a_damaged_set_is_named(processor, tmp_path, damage):
    calibration, _, manifest = extract(SPEC, processor, UNTRAINED)
    path = tmp_path / "set.parquet"
    write_samples(path, calibration)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"]}), path)
    with pytest.raises(InputError, match=r"set\.parquet: not a calibration set .*run the calibration rule again"):
        load_batches(path, manifest, processor)


def test_a_conversation_is_stored_whole_and_can_be_drawn_from_again(processor, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"image": "a.png", "messages": messages}))
    one = {"num_samples": 1, "num_heldout": 0, "batch_size": 1, "max_tokens": 512}
    (first,), _, manifest = extract(local(path, **one), processor, UNTRAINED)
    assert first.sample.prompt == "Sure?" and first.sample.answer == "Yes." and len(first.sample.turns) == 4
    write_samples(tmp_path / "stored.parquet", [first])
    assert len(load_batches(tmp_path / "stored.parquet", manifest, processor)) == 1
    (again,), _, _ = extract(local(tmp_path / "stored.parquet", **one), processor, UNTRAINED)
    assert (again.sample.turns, again.input_ids) == (first.sample.turns, first.input_ids)


def test_all_bad_samples_of_a_draw_are_named_in_one_error(processor, tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (3000, 5)).save(tmp_path / "thin.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    images = ["a.png", "gone.png", "damaged.png", "thin.png"]
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": "x", "image": image} for image in images] + [{"prompt": "<|im_end|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        extract(local(path, num_samples=4, num_heldout=1, batch_size=1), processor, UNTRAINED)
    message = str(caught.value)
    assert "4 samples cannot be used" in message
    for part in ("gone.png does not exist", "damaged.png cannot be read", "aspect ratio", "special token <|im_end|>"):
        assert part in message


def test_images_are_stored_at_the_size_that_the_processor_makes(processor, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    spec = local(tmp_path, num_samples=1, num_heldout=0, batch_size=1, max_pixels=12544, max_tokens=512)
    samples, _, manifest = extract(spec, processor, UNTRAINED)
    assert samples[0].sample.images[0].size == (112, 84)
    write_samples(tmp_path / "set.parquet", samples)
    (batch,) = load_batches(tmp_path / "set.parquet", manifest, processor)
    size = {"shortest_edge": 3136, "longest_edge": 12544}
    whole = processor.image_processor(images=[Image.fromarray(noise)], size=size, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])


def test_one_image_is_in_memory_at_a_time(processor, tmp_path, monkeypatch):
    """Each sample is handed on before the next image is opened, and nothing keeps the pixels of its file."""
    for number in range(6):
        Image.new("RGB", (300, 300), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    opened, alive = [], []
    open_picture = sources.open_picture

    def recorded(*arguments):
        picture = open_picture(*arguments)
        opened.append(weakref.ref(picture.image))
        alive.append(sum(image() is not None for image in opened))
        return picture

    monkeypatch.setattr(sources, "open_picture", recorded)
    stored = []
    stores = {
        "calibration": lambda item: stored.append((len(opened), item.sample.images[0].size)),
        "heldout": lambda item: stored.append((len(opened), item.sample.images[0].size)),
    }
    extract_into(stores, local(tmp_path), processor, UNTRAINED)
    assert stored == [(number, (28, 28)) for number in range(1, 7)]
    assert alive == [1] * 6


def test_answers_that_cannot_be_located_are_told(processor):
    changed = copy.deepcopy(processor.tokenizer)
    changed.chat_template = changed.chat_template.replace("{{ part.text }}", "{{ part.text | replace('1', 'one') }}")
    spec = SPEC.model_copy(update={"num_samples": 20, "batch_size": 1})
    manifest = extract(spec, replace(processor, tokenizer=changed), UNTRAINED)[2]
    digits = [int(entry.id.removeprefix("digit-")) for entry in manifest.samples["calibration"]]
    ones = sum(sample.answer == "1" for sample in digit_samples(digits))
    assert 0 < ones < 20
    assert manifest.answers["calibration"] == Answers(given=20, located=20 - ones)
    assert f"answers located in {20 - ones} of 20 calibration samples" in " ".join(remarks(manifest))
    assert remarks(extract(SPEC, processor, UNTRAINED)[2]) == []


def test_a_template_that_leaves_the_prompt_out_gives_one_sample_to_the_model(processor, tmp_path):
    deaf = copy.deepcopy(processor.tokenizer)
    deaf.chat_template = "hello"
    (tmp_path / "set.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    spec = local(tmp_path / "set.jsonl", num_samples=1, num_heldout=1, batch_size=1)
    with pytest.raises(InputError, match="the same to the model.*chat template writes the prompt"):
        extract(spec, replace(processor, tokenizer=deaf), UNTRAINED)


def test_columns_of_a_parquet_file_that_are_not_read_are_told(processor, tmp_path):
    table = pyarrow.table({"prompt": ["x", "y"], "system": ["be brief", "be kind"]})
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    manifest = extract(local(tmp_path / "set.parquet", num_samples=2, num_heldout=0), processor, UNTRAINED)[2]
    assert remarks(manifest) == [f"{tmp_path / 'set.parquet'} has columns that are not read: system"]


def test_what_a_folder_skips_and_animations_are_told(processor, tmp_path):
    frames = [Image.new("RGB", (60, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "b.heic").touch()
    spec = local(tmp_path, num_samples=1, num_heldout=0, batch_size=1)
    samples, _, manifest = extract(spec, processor, UNTRAINED)
    assert samples[0].sample.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert manifest.details == {"skipped": {".heic": 1}, "first_frame_only": [str(tmp_path / "a.gif")]}
    assert manifest.source_digest == samples_digest(tmp_path)
    assert remarks(manifest) == [
        f"{tmp_path} holds files that are no images, which were skipped: 1 .heic",
        f"1 images are animations or have several pages; the first frame alone is used: {tmp_path / 'a.gif'}",
    ]


def test_a_model_without_a_chat_template_takes_plain_text(processor, tmp_path):
    plain = copy.deepcopy(processor.tokenizer)
    plain.chat_template = None
    processor = replace(processor, tokenizer=plain)
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "One and one is", "answer": " two."}\n')
    spec = local(path, num_samples=1, num_heldout=0, batch_size=1)
    with pytest.raises(InputError, match="no chat template .*set calibration.format to plain"):
        extract(spec, processor, UNTRAINED)
    (item,), _, manifest = extract(spec.model_copy(update={"format": "plain"}), processor, UNTRAINED)
    assert plain.decode(item.input_ids) == "One and one is two."
    assert manifest.format == "plain" and manifest.answers["calibration"] == Answers(given=1, located=1)


def test_a_template_without_end_stops_the_extraction(processor, monkeypatch):
    monkeypatch.setattr("auto_quantize_model.models.chat_template.SECONDS", 1)
    endless = copy.deepcopy(processor.tokenizer)
    endless.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"^sample digit-\d+: the chat template takes more than 1 seconds"):
        extract(SPEC, replace(processor, tokenizer=endless), UNTRAINED)
