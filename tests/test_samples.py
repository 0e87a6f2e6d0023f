"""One sample to tensors: image tokens that match the image, limits that hold, batches without padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from auto_quantize_model.digits import digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.samples import Limits, Sample, collate, encode, render_conversation
from auto_quantize_model.snapshot import Processor

LIMITS = Limits(min_pixels=3136, max_pixels=12544, max_tokens=512)
PATCH_SIDE = 14  # pixels; an image token stands for two by two patches


def test_an_image_sample_becomes_the_models_arguments(processor: Processor) -> None:
    encoded = encode(digit_samples([0])[0], processor, LIMITS)
    tokens = encoded["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert encoded[name].shape == (1, tokens)
        assert encoded[name].dtype == torch.int64
    assert bool(encoded["attention_mask"].all())
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert encoded["pixel_values"].shape == (16, 3 * 2 * PATCH_SIDE**2)
    assert encoded["pixel_values"].dtype == torch.float32
    assert torch.equal(encoded["mm_token_type_ids"].bool(), encoded["input_ids"] == processor.image_token_id)


def test_the_same_sample_gives_the_same_bits(processor: Processor) -> None:
    first, second = (encode(digit_samples([7])[0], processor, LIMITS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_different_digits_give_different_pixels(processor: Processor) -> None:
    first, second = (encode(sample, processor, LIMITS)["pixel_values"] for sample in digit_samples([0, 1]))
    assert not torch.equal(first, second)


@given(width=st.integers(20, 400), height=st.integers(20, 400))
@settings(max_examples=25, deadline=None)
def test_an_image_of_any_size_keeps_the_limits_and_has_its_tokens(
    processor: Processor, width: int, height: int
) -> None:
    encoded = encode(Sample("any", "What is it?", Image.new("RGB", (width, height))), processor, LIMITS)
    patches = int(encoded["image_grid_thw"].prod())
    assert LIMITS.min_pixels <= patches * PATCH_SIDE**2 <= LIMITS.max_pixels
    assert encoded["pixel_values"].shape[0] == patches
    assert int(encoded["mm_token_type_ids"].sum()) == patches // 4


def test_a_text_sample_has_no_image_inputs(processor: Processor) -> None:
    encoded = encode(Sample("text", "Which digit is this?"), processor, LIMITS)
    assert set(encoded) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not encoded["mm_token_type_ids"].any()


def test_an_answer_is_the_assistants_turn_and_without_it_the_turn_is_opened(processor: Processor) -> None:
    answered = render_conversation(Sample("a", "How many?", answer="7"), processor)
    opened = render_conversation(Sample("a", "How many?"), processor)
    assert answered.endswith("<|im_start|>assistant\n7<|im_end|>\n")
    assert opened.endswith("<|im_start|>assistant\n")


def test_words_outside_the_tokenizers_merges_come_back(processor: Processor) -> None:
    ids = encode(Sample("a", "Größe? 数字 🙂"), processor, LIMITS)["input_ids"][0]
    assert "Größe? 数字 🙂" in processor.tokenizer.decode(ids)


def test_the_token_limit_is_inclusive_and_the_error_names_the_sample(processor: Processor) -> None:
    sample = digit_samples([42])[0]
    tokens = encode(sample, processor, LIMITS)["input_ids"].shape[1]
    encode(sample, processor, Limits(3136, 12544, tokens))
    with pytest.raises(InputError, match=rf"digit-0042: {tokens} tokens, over the limit of {tokens - 1}; raise"):
        encode(sample, processor, Limits(3136, 12544, tokens - 1))


@pytest.mark.parametrize("words", [{"prompt": "<|image_pad|>"}, {"prompt": "x", "answer": "a <|image_pad|>"}])
def test_the_image_token_among_the_words_is_refused(processor: Processor, words: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"sample a: its text contains the image token <\|image_pad\|>"):
        encode(Sample("a", **words), processor, LIMITS)


def test_samples_of_equal_length_are_stacked_in_their_order(processor: Processor) -> None:
    encoded = [encode(sample, processor, LIMITS) for sample in digit_samples([3, 5])]
    batch = collate(encoded)
    assert batch["input_ids"].shape[0] == 2
    assert batch["image_grid_thw"].shape == (2, 3)
    assert torch.equal(batch["pixel_values"], torch.cat([sample["pixel_values"] for sample in encoded]))


def test_samples_of_unequal_length_are_refused(processor: Processor) -> None:
    encoded = [encode(Sample("a", prompt), processor, LIMITS) for prompt in ("x", "x and more")]
    with pytest.raises(InputError, match=r"cannot share a batch without padding.*set calibration\.batch_size to 1"):
        collate(encoded)


def test_samples_with_and_without_image_are_refused_even_at_equal_length(processor: Processor) -> None:
    encoded = encode(digit_samples([0])[0], processor, LIMITS)
    text = {name: value for name, value in encoded.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(InputError, match="with and without image"):
        collate([encoded, text])
