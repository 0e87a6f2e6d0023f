"""An untrusted chat template is rendered unchanged, and stopped when it takes too much time, memory or length."""

import copy
from typing import Any

import pytest

from auto_quantize_model.files import InputError
from auto_quantize_model.models import chat_template
from auto_quantize_model.models.chat_template import TemplateStopped, limited_renderer, renderer
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.sample import Sample
from auto_quantize_model.models.words import messages

MESSAGES = messages(Sample("a", "Which digit?"), "7", parted=True)


@pytest.fixture
def tokenizer(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    return copy.deepcopy(processor.tokenizer)


def test_a_limited_template_gives_the_same_text(tokenizer: Any) -> None:
    with limited_renderer(tokenizer) as render:
        for opened in (True, False):
            assert render(MESSAGES, opened) == renderer(tokenizer)(MESSAGES, opened)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=100000000) }}",
    ],
)
def test_a_template_without_end_is_stopped(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with (
        limited_renderer(tokenizer) as render,
        pytest.raises(TemplateStopped, match="the chat template takes more than 1 seconds for one sample"),
    ):
        render(MESSAGES, False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "MemoryError"),
        ("{{ '{:>10000000000}'.format(1) }}", "MemoryError"),
        ("{{ [0] * 10 ** 10 }}", "MemoryError"),
        ("{% for i in range(10 ** 12) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 5000000 }}", "a text of 5000000 characters, over the limit"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_what_a_limited_template_raises_is_named(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with limited_renderer(tokenizer) as render, pytest.raises(InputError, match=f"the chat template .*{message}"):
        render(MESSAGES, False)


def test_after_an_error_the_next_sample_is_rendered(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 6 // (messages | length - 2) }}"
    with limited_renderer(tokenizer) as render:
        with pytest.raises(InputError, match="ZeroDivisionError"):
            render(MESSAGES, False)
        assert render(MESSAGES[:1], False) == "-6"


def test_half_of_a_character_that_a_template_writes_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ '\\ud800' }}"
    with limited_renderer(tokenizer) as render, pytest.raises(InputError, match="the chat template fails .*surrogates"):
        render(MESSAGES, False)
