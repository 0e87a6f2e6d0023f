"""Calibration sets: drawn by a seed, disjoint, stored as they are, and refused where they are wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_quantize_model.calibration import CalibrationSpec, extract, load_batches, read_samples, write_samples
from auto_quantize_model.digits import digit_samples, digits_split
from auto_quantize_model.files import InputError

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
UNTRAINED = {"details": {}}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    rows = []
    for sample in digit_samples(range(6)):
        sample.image.save(tmp_path / f"{sample.id}.png")
        rows.append({"image": f"{sample.id}.png", "prompt": sample.prompt, "answer": sample.answer})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def local(path: Path, **changes: object) -> CalibrationSpec:
    return replace(SPEC, source="local", path=str(path), **changes)


@given(st.integers(min_value=0, max_value=2**32 - 1))
@settings(max_examples=25)
def test_digit_splits_are_disjoint_and_complete(seed):
    split = digits_split(seed)
    assert sorted(index for indices in split.values() for index in indices) == list(range(1797))
    assert digits_split(seed) == split


def test_digits_come_from_the_splits_that_training_left_aside(processor):
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    split = digits_split(0)
    for samples, name in ((calibration, "calibration"), (heldout, "heldout")):
        assert {int(sample.id.removeprefix("digit-")) for sample in samples} <= set(split[name])
    assert not manifest["text_only"]
    assert all(entry["image_tokens"] == 4 for entry in manifest["samples"]["calibration"])


def test_the_same_seed_draws_the_same_set_and_another_seed_another(processor):
    manifests = [extract(replace(SPEC, seed=seed), processor, UNTRAINED)[2] for seed in (0, 0, 1)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["digest"] != manifests[2]["digest"]


def test_stored_samples_come_back_bit_for_bit(processor, tmp_path):
    calibration, _, manifest = extract(SPEC, processor, UNTRAINED)
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.parquet", calibration)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    restored = read_samples(tmp_path / "a.parquet")
    assert [sample.image.tobytes() for sample in restored] == [sample.image.tobytes() for sample in calibration]
    batches = load_batches(tmp_path / "a.parquet", manifest, processor)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2]
    assert batches[0]["pixel_values"].dtype == torch.float32


def test_a_set_that_is_not_its_manifests_is_refused(processor, tmp_path):
    calibration, heldout, manifest = extract(SPEC, processor, UNTRAINED)
    write_samples(tmp_path / "set.parquet", heldout)
    with pytest.raises(InputError, match="not the samples of its manifest"):
        load_batches(tmp_path / "set.parquet", manifest, processor)


def test_jsonl_folder_and_parquet_give_the_same_images(processor, jsonl, tmp_path):
    spec = local(jsonl)
    from_jsonl, heldout, _ = extract(spec, processor, UNTRAINED)
    assert not {sample.id for sample in from_jsonl} & {sample.id for sample in heldout}
    from_folder, _, _ = extract(local(tmp_path), processor, UNTRAINED)
    stored = tmp_path / "stored.parquet"
    write_samples(stored, [*digit_samples(range(6))])
    from_parquet, _, _ = extract(local(stored), processor, UNTRAINED)
    pixels = [[sample.image.tobytes() for sample in samples] for samples in (from_jsonl, from_folder, from_parquet)]
    assert pixels[0] == pixels[1] == pixels[2]
    assert {sample.prompt for sample in from_folder} == {"Describe this image."}


def test_text_only_samples_are_allowed_and_marked(processor, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {number}"}) + "\n" for number in range(3)))
    _, _, manifest = extract(local(path, num_samples=2, num_heldout=0, batch_size=1), processor, UNTRAINED)
    assert manifest["text_only"]


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
        extract(replace(SPEC, max_tokens=23), processor, UNTRAINED)


def test_samples_of_different_length_do_not_share_a_batch(processor, jsonl):
    lines = jsonl.read_text().splitlines()
    row = json.loads(lines[0]) | {"prompt": "A much longer question than the others: which digit is this?"}
    jsonl.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(InputError, match=r"set calibration\.batch_size to 1"):
        extract(local(jsonl, num_samples=6, num_heldout=0), processor, UNTRAINED)


def test_the_image_token_in_a_prompt_is_refused(processor, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "<|image_pad|>"}) + "\n")
    with pytest.raises(InputError, match=r"contains the image token <\|image_pad\|>"):
        extract(local(path, num_samples=1, num_heldout=0, batch_size=1), processor, UNTRAINED)
