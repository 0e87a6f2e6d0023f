"""Untrusted text is shown as it is: it begins no markup, hides nothing, and computes nothing."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from auto_quantize_model.escape import code, one_line, printable, prose, redacted, spreadsheet_cell

GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](https://example.org/x.png)",
    "[ref]: https://example.org",
    "<https://example.org>",
    "a|b|c",
    "a\\|b\\",
    "`code` ``more``",
    "**bold** _soft_ ~~gone~~",
    "&lt;b&gt; &#60;",
    "$x^2$",
    "<!-- comment",
    "</code></td></table>",
]


class Seen(HTMLParser):
    """The tags of a rendered text and what a reader sees of it."""

    def __init__(self, markdown):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(GITHUB.render(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_markdown_is_seen_as_it_is_and_makes_no_element(text):
    for shown in (prose(text), code(text)):
        page = Seen(f"Name: {shown}.")
        assert set(page.tags) <= {"p", "code", "wbr"}
        assert page.text.strip() == f"Name: {text}."
        table = Seen(f"| a | b |\n|---|---|\n| {shown} | last |\n")
        assert table.tags.count("td") == 2 and f"\n{text}\nlast\n" in table.text
        assert "<script" not in shown and "](" not in shown


@given(st.text())
def test_any_text_stays_in_its_cell(text):
    text = text.strip()  # a name loses blanks at its ends, a piece of a sentence keeps them
    for shown in (prose(text), code(text)):
        table = Seen(f"| a | b |\n|---|---|\n| x{shown}x | last |\n")
        assert table.tags.count("td") == 2 and table.tags.count("tr") == 2
        assert set(table.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code", "wbr"}
        assert f"x{one_line(text)}x" in table.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("www.example.org", "www&#46;example.org"),
        ("see https://example.org", "see https&#58;//example.org"),
        ("thanks @someone", "thanks &#64;<wbr>someone"),
        ("mail a@example.org", "mail a&#64;<wbr>example.org"),
        ("closes #12", "closes &#35;<wbr>12"),
        ("min_sqnr_db 45: reached (3 of 4).", "min_sqnr_db 45: reached (3 of 4)."),
    ],
)
def test_what_github_links_by_itself_is_no_link_and_our_own_sentences_stay_readable(text, shown):
    assert prose(text) == shown


def test_a_plain_name_is_a_code_span():
    assert code("model.layers.0.mlp") == "`model.layers.0.mlp`"
    assert code("photos/a\nb.jpg") == "`photos/a b.jpg`"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("\u2066x\u2069\x85", "\\u2066x\\u2069\\x85"),
        ("name\udcff", "name\\udcff"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Grüße 世界 👩‍👩‍👧", "Grüße 世界 👩‍👩‍👧"),
    ],
)
def test_control_characters_become_visible(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+1", "'+1+1"),
        ("-2", "'-2"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("\t=1", "'\t=1"),
        ("\r=1", "\\r=1"),
        ("model.layers.0", "model.layers.0"),
    ],
)
def test_a_spreadsheet_computes_no_text(text, shown):
    assert spreadsheet_cell(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get http://user:p@ss:w0rd@hub.example/api?a=b", "get http://***@hub.example/api?a=b"),
        ("https://token@hub.example", "https://***@hub.example"),
        ("plain https://hub.example/a@b stays", "plain https://hub.example/a@b stays"),
        ("{'authorization': 'Bearer abc.def-1'}", "{'authorization': 'Bearer ***'}"),
        ("(b'Authorization', b'Basic dXNlcjpwYXNz')", "(b'Authorization', b'Basic ***')"),
        ("https://cdn/x?X-Amz-Signature=0a1b&n=1", "https://cdn/x?X-Amz-Signature=***&n=1"),
        ("sent hf_AbCdEfGhIjKl", "sent ***"),
        ("the basic information of a token", "the basic information of a token"),
    ],
)
def test_secrets_are_hidden_in_urls_headers_and_alone(text, shown):
    assert redacted(text) == shown


def test_secrets_of_the_environment_are_hidden_in_every_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "opaque+token")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:sec/ret-word@proxy:3128")
    assert redacted("opaque+token opaque%2Btoken b3BhcXVlK3Rva2Vu") == "*** *** ***"
    assert redacted("no port: 'ret-word' in me:sec/ret-word@proxy") == "no port: '***' in ***@proxy"
    assert redacted("an opaque tokenizer") == "an opaque tokenizer"
    monkeypatch.setenv("HF_ENDPOINT", "http://me:p%40ss%2Fword@host")
    assert redacted("no host in http://me:p@ss/word@host/api") == "no host in http://***@host/api"
    assert redacted("next=http%3A%2F%2Fme%3Ap%40ss%2Fword%40host") == "next=http%3A%2F%2Fme%3A***%40host"


@pytest.mark.parametrize("name", ["api_key", "apikey", "key", "auth", "passwd", "pwd", "id_token"])
@pytest.mark.parametrize("sign", "?&#")
def test_secrets_in_the_query_of_a_url_are_hidden(name, sign):
    assert redacted(f"https://host/a{sign}{name}=abc123&b=1") == f"https://host/a{sign}{name}=***&b=1"


def test_settings_whose_names_only_look_secret_hide_no_words(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "true")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    text = "deterministic: false, tf32: true; /home/me/token cannot be read"
    assert redacted(text) == text
