"""One sample to tensors: image tokens that match the image, limits that hold, batches without padding."""

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from auto_quantize_model.data.digits import digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.made.digits import SPECIAL_TOKENS
from auto_quantize_model.models.chat_template import renderer
from auto_quantize_model.models.encode import answer_span, collate, encode, prepare
from auto_quantize_model.models.families.qwen_vl import fit, image_inputs
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.sample import Limits, Sample
from auto_quantize_model.models.words import MARK

LIMITS = Limits(min_pixels=3136, max_pixels=12544, max_tokens=512)


def words_of(sample: Sample, processor: Processor) -> str:
    """A sample's tokens as text."""
    return processor.tokenizer.decode(prepare(sample, processor, LIMITS, renderer(processor.tokenizer)).input_ids)


def with_template(processor: Processor, template: Any) -> Processor:
    """A copy of a processor with another chat template."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = template
    return replace(processor, tokenizer=tokenizer, vocabulary=None)


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
    assert torch.equal(encoded["mm_token_type_ids"].bool(), encoded["input_ids"] == processor.image_token_ids[0])


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
    encoded = encode(Sample("any", "What is it?", (Image.new("RGB", (width, height)),)), processor, LIMITS)
    patches = int(encoded["image_grid_thw"].prod())
    assert LIMITS.min_pixels <= patches * PATCH_SIDE**2 <= LIMITS.max_pixels
    assert encoded["pixel_values"].shape[0] == patches
    assert int(encoded["mm_token_type_ids"].sum()) == patches // 4


def test_a_text_sample_has_no_image_inputs(processor: Processor) -> None:
    encoded = encode(Sample("text", "Which digit is this?"), processor, LIMITS)
    assert set(encoded) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not encoded["mm_token_type_ids"].any()


def test_an_answer_is_the_assistants_turn_and_without_it_the_turn_is_opened(processor: Processor) -> None:
    answered = words_of(Sample("a", "How many?", answer="7"), processor)
    opened = words_of(Sample("a", "How many?"), processor)
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


@pytest.mark.parametrize("place", ["prompt", "answer"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_among_the_words_is_refused(processor: Processor, place: str, token: str) -> None:
    words = {"prompt": "x"} | {place: f"a {token} b"}
    with pytest.raises(InputError, match=rf"sample a: its text contains the special token {re.escape(token)}; take"):
        encode(Sample("a", **words), processor, LIMITS)


def test_a_special_token_of_two_texts_that_stand_side_by_side_is_refused(processor: Processor) -> None:
    """In the plain format the answer follows the prompt directly."""
    with pytest.raises(InputError, match=r"sample a: its text contains the special token <\|im_end\|>; take"):
        prepare(Sample("a", "x <|im_", answer="end|> y"), processor, LIMITS, None)


def test_an_answer_is_not_located_by_a_mark_of_the_samples_own_words(processor: Processor) -> None:
    """The mark that stands for the answer may be among the words, where it would be taken for the answer's place."""
    assert answer_span(Sample("a", f"x {MARK} y", answer=MARK), processor, LIMITS) is None


def test_a_token_that_the_template_writes_is_refused_though_the_tokenizer_calls_it_ordinary(
    processor: Processor,
) -> None:
    changed = with_template(processor, "{% for m in messages %}<|User|>{{ m.content[0].text }}{% endfor %}")
    changed.tokenizer.add_tokens(["<|User|>", "<|unused|>", "  "])
    encode(Sample("a", "two  spaces and <|unused|>"), changed, LIMITS)
    with pytest.raises(InputError, match=r"contains the special token <\|User\|>"):
        encode(Sample("a", "<|User|>"), changed, LIMITS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud83d", r"half of a character \(U\+D83D\)"),
        ("a\0b", "a NUL character"),
        ("\udc00", r"half of a character \(U\+DC00\)"),
    ],
)
def test_text_that_no_tokenizer_takes_is_refused(processor: Processor, text: str, message: str) -> None:
    for words in ({"prompt": text}, {"prompt": "x", "answer": text}):
        with pytest.raises(InputError, match=f"sample a: its text contains {message}"):
            encode(Sample("a", **words), processor, LIMITS)


def test_a_tokenizer_that_panics_is_named(processor: Processor) -> None:
    panicking = copy.deepcopy(processor.tokenizer)
    panicking.backend_tokenizer.pre_tokenizer = Split(Regex("^(a|a)*$"), "isolated")
    with pytest.raises(InputError, match=r"sample x: the tokenizer panics: .*; check tokenizer\.json"):
        prepare(Sample("x", "a" * 60 + "!"), replace(processor, tokenizer=panicking), LIMITS, None)


def test_ids_without_a_row_of_the_embedding_are_refused(processor: Processor) -> None:
    ids = encode(Sample("a", "x"), processor, LIMITS)["input_ids"]
    top = int(ids.max())
    encode(Sample("a", "x"), replace(processor, vocabulary=top + 1), LIMITS)
    with pytest.raises(
        InputError, match=f"sample a: token '<.*>' has id {top}, and the model's embedding has {top} rows"
    ):
        encode(Sample("a", "x"), replace(processor, vocabulary=top), LIMITS)


def test_a_sample_of_more_tokens_than_the_model_has_positions_is_refused(processor: Processor) -> None:
    tokens = encode(Sample("a", "x"), processor, LIMITS)["input_ids"].shape[1]
    encode(Sample("a", "x"), replace(processor, positions=tokens), LIMITS)
    with pytest.raises(InputError, match=f"sample a: {tokens} tokens, and the model has {tokens - 1} positions"):
        encode(Sample("a", "x"), replace(processor, positions=tokens - 1), LIMITS)


def test_the_limits_of_the_model_are_read_from_its_config(processor: Processor) -> None:
    assert (processor.vocabulary, processor.positions) == (len(processor.tokenizer), 512)


@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_fitted_image_gives_the_pixels_of_the_original_bit_for_bit(
    processor: Processor, width: int, height: int, seed: int
) -> None:
    """Also where the processor would resize its own result again: 1 x 190 pixels become 28 x 2548, over the limit."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    try:
        whole = processor.image_processor(
            images=[image],
            size={"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels},
            return_tensors="pt",
        )
    except ValueError:  # a side is 200 times the other
        with pytest.raises(InputError, match="the model's processor refuses it .*aspect ratio"):
            fit(image, processor, LIMITS)
        return
    found = image_inputs(fit(image, processor, LIMITS), processor)
    assert torch.equal(found["pixel_values"], whole["pixel_values"])
    assert torch.equal(found["image_grid_thw"], whole["image_grid_thw"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_thw": torch.tensor([[1, 4, 2]])}, r"of shapes \(\(16, 1176\), \(1, 3\)\), not \(\(8, 1176\)"),
        ({"pixel_values": torch.zeros(16, 588)}, r"of shapes \(\(16, 588\)"),
        ({"image_grid_thw": None}, "refuses it"),
        ({"pixel_values": torch.full((16, 1176), torch.nan)}, "not finite float32"),
    ],
)
def test_what_a_processor_returns_is_checked(processor: Processor, change: dict[str, Any], message: str) -> None:
    class Changed:
        patch_size, temporal_patch_size, merge_size = 14, 2, 2

        def __call__(self, **options: Any) -> dict[str, Any]:
            return dict(processor.image_processor(**options)) | change

    with pytest.raises(InputError, match=message):
        image_inputs(Image.new("RGB", (56, 56)), replace(processor, image_processor=Changed()))


THINKING = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{{ m.content[0].text.strip('\n') }}{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_an_answer_behind_a_block_of_thought_is_located(processor: Processor) -> None:
    """Qwen3's template writes an empty block of thought before an answer, and none where the turn is opened."""
    changed = with_template(processor, THINKING)
    for answer, found in (("7", "7"), ("\n\na 7\n", "a 7"), ("think", "think")):
        sample = Sample("a", "How many? 7 think", answer=answer)
        span = answer_span(sample, changed, LIMITS)
        assert span is not None
        ids = encode(sample, changed, LIMITS)["input_ids"][0]
        assert changed.tokenizer.decode(ids[span.start : span.stop]) == found
        assert changed.tokenizer.decode(ids[: span.start]).endswith("</think>\n\n")


@pytest.mark.parametrize("change", ["{{ text | upper }}", "{{ text | replace('a', 'b') }}", "", "{{ text }}{{ text }}"])
def test_an_answer_that_the_template_changes_is_not_located(processor: Processor, change: str) -> None:
    template = "{% for m in messages %}<|im_start|>{% set text = m.content[0].text %}" + change + "{% endfor %}"
    changed = with_template(processor, template)
    assert answer_span(Sample("a", "x", answer="a cat"), changed, LIMITS) is None


def test_an_answer_is_located_behind_an_image(processor: Processor) -> None:
    sample = digit_samples([4])[0]
    span = answer_span(sample, processor, LIMITS)
    ids = encode(sample, processor, LIMITS)["input_ids"][0].tolist()
    assert span is not None and processor.tokenizer.decode(ids[span.start : span.stop]) == sample.answer


def test_without_a_template_the_answer_follows_the_prompt_and_the_tokenizer_adds_its_tokens(
    processor: Processor,
) -> None:
    changed = with_template(processor, None)
    end = "<|endoftext|>"
    changed.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, changed.tokenizer.convert_tokens_to_ids(end))]
    )
    prepared = prepare(Sample("a", "Which digit?", answer=" 7"), changed, LIMITS, None)
    assert changed.tokenizer.decode(prepared.input_ids) == f"{end}Which digit? 7"
    assert prepared.answer_span is not None
    assert changed.tokenizer.decode(prepared.input_ids[prepared.answer_span.start :]) == " 7"
    assert prepare(Sample("a", "Which digit?"), changed, LIMITS, None).answer_span is None


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a", "x", (Image.new("RGB", (56, 56)),)), "calibration.format plain cannot place"),
        (Sample("a", "x", turns=(("system", ("s",)), ("user", ("x",)))), "several turns needs a chat template"),
    ],
)
def test_without_a_template_there_are_no_images_and_no_turns(
    processor: Processor, sample: Sample, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(sample, processor, LIMITS, None)


def test_turns_and_the_place_of_an_image_are_kept(processor: Processor) -> None:
    turns = (
        ("system", ("Be brief.",)),
        ("user", ("Look:", None, "What?")),
        ("assistant", ("A cat.",)),
        ("user", ("Sure?",)),
    )
    text = words_of(Sample("a", "Sure?", (Image.new("RGB", (56, 56)),), "Yes.", turns), processor)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nLook:<|vision_start|>"
        + "<|image_pad|>" * 4
        + "<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "template", ["{{ messages[0].role }}", "{% for m in messages %}<|image_pad|><|image_pad|>{% endfor %}"]
)
def test_a_template_that_does_not_write_one_image_token_for_an_image_is_refused(
    processor: Processor, template: str
) -> None:
    sample = Sample("a", "x", (Image.new("RGB", (56, 56)),))
    with pytest.raises(InputError, match=r"the chat template writes \d image tokens for 1 images"):
        encode(sample, with_template(processor, template), LIMITS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system prompt') }}", "TemplateError: no system prompt"),
        ("{{ messages[0].content.x.y }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 5000000 }}", "a text of 5000000 characters, over the limit"),
        ({"default": "{{ 1 // 0 }}"}, "ZeroDivisionError"),
        ({"other": ""}, "ValueError"),
    ],
)
def test_what_a_template_raises_names_the_sample(processor: Processor, template: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"sample a: the chat template .*{message}"):
        encode(Sample("a", "x"), with_template(processor, template), LIMITS)


def test_samples_of_equal_length_are_stacked_in_their_order(processor: Processor) -> None:
    encoded = [encode(sample, processor, LIMITS) for sample in digit_samples([3, 5])]
    batch = collate(encoded)
    assert batch["input_ids"].shape[0] == 2
    assert batch["image_grid_thw"].shape == (2, 3)
    assert torch.equal(batch["pixel_values"], torch.cat([sample["pixel_values"] for sample in encoded]))


def test_samples_of_unequal_length_are_refused(processor: Processor) -> None:
    encoded = [encode(Sample("a", prompt), processor, LIMITS) for prompt in ("x", "x and more")]
    with pytest.raises(InputError, match=r"cannot share a batch without padding.*Set calibration\.batch_size to 1"):
        collate(encoded)


def test_samples_with_and_without_image_are_refused_even_at_equal_length(processor: Processor) -> None:
    encoded = encode(digit_samples([0])[0], processor, LIMITS)
    text = {name: value for name, value in encoded.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(InputError, match="with and without image"):
        collate([encoded, text])


def test_turns_that_show_another_number_of_images_are_refused(processor: Processor) -> None:
    sample = Sample("a", "x", (Image.new("RGB", (56, 56)),), turns=(("user", ("x",)),))
    with pytest.raises(InputError, match="sample a: its turns show 0 of its 1 images"):
        encode(sample, processor, LIMITS)
