"""Texts for people are plain: short sentences, no worn words. `python benchmarks/prose.py` shows what is left."""

from pathlib import Path

import prose
import pytest


def test_every_sentence_is_short_and_has_no_worn_word() -> None:
    found = prose.violations(prose.files())
    assert not found, "\n".join(prose.described(found))


def split(text: str) -> list[str]:
    return [" ".join(sentence.split()) for _, sentence, _ in prose.split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One ends. Another begins.", ["One ends.", "Another begins."]),
        ("Read `plan.json`. torch makes it.", ["Read `plan.json`.", "torch makes it."]),
        ("A name, e.g. Linear, is kept.", ["A name, e.g. Linear, is kept."]),
        ("See docs/a.md for torch 2.13.0, or 0.5 s.", ["See docs/a.md for torch 2.13.0, or 0.5 s."]),
        ("Files lie in results/NAME/... and stay.", ["Files lie in results/NAME/... and stay."]),
        ("Run `a. B? c` once; then stop: it is done.", ["Run `a. B? c` once; then stop: it is done."]),
        ("Is it exact? (Yes.) **It is.** Good", ["Is it exact?", "(Yes.)", "**It is.**", "Good"]),
    ],
)
def test_a_sentence_ends_where_a_reader_ends_it(text: str, expected: list[str]) -> None:
    assert split(text) == expected


def sentences(folder: Path, name: str, text: str) -> list[prose.Sentence]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return prose.sentences(path, folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Call `run(a, b)` at once.", 4),
        ("Keep `a`, `b.c` and `d` here.", 3),
        ("An SQNR of 34.25 dB — k = 1.", 7),
        ("See [the long page](docs/page.md) or https://host/a/b now.", 6),
    ],
)
def test_a_code_span_is_one_word_and_an_address_none(tmp_path: Path, text: str, words: int) -> None:
    assert [sentence.words for sentence in sentences(tmp_path, "a.md", text)] == [words]


@pytest.mark.parametrize(
    ("text", "worn"),
    [
        ("A journal lies\nbeside it, begun anew.", ("beside", "anew")),
        ("Besides, there is no score, and it is no longer read.", ()),
        ("It is no file; `whence` is a name.", ("is no",)),
        ("The ranking has to earn its place.", ("earn its place",)),
    ],
)
def test_worn_words_are_found_across_lines_and_not_in_code(tmp_path: Path, text: str, worn: tuple[str, ...]) -> None:
    assert sum((sentence.worn for sentence in sentences(tmp_path, "a.md", text)), ()) == worn


MARKDOWN = """# A title

A paragraph of
two lines. Its second sentence.

- An item
  goes on here
- another item

| a cell | another cell |
|---|---|

```sh
make run  # is code
```
> A quotation.
"""
PYTHON = '''"""What it does.

    python is_code.py

- An item.
"""

import argparse  # noqa: F401  why not

# A comment of
# two lines.
parser.add_argument("--a", help="help of" " an option")
limit = 3  # of tries


def f():
    """Do it.

    Args:
        one: the first,
            with a second line.
        two: another one.

    Raises:
        InputError: a bad value.
    """
    raise InputError(f"{path}: a message of six words or more; mend it")
'''
TEMPLATE = """{% set x = "not read" %}
Text with {{ value | code }}{% if one %} and one{% else %} or another{% endif %}.
{# not read #}
"""
PAGE = "<script>not.read()</script>\n<p>A <code>name</code> in a <b>text</b>.</p>\n<td>1</td><td>A cell</td>\n"
CASES = {
    "a.md": (
        MARKDOWN,
        [(1, "A title"), (3, "A paragraph of two lines."), (4, "Its second sentence."), (6, "An item goes on here")]
        + [(8, "another item"), (10, "a cell"), (10, "another cell"), (16, "A quotation.")],
    ),
    "a.py": (
        PYTHON,
        [(1, "What it does."), (5, "An item."), (10, "A comment of two lines."), (12, "help of an option")]
        + [(13, "of tries"), (17, "Do it."), (20, "one: the first, with a second line."), (22, "two: another one.")]
        + [(25, "InputError: a bad value."), (27, "x: a message of six words or more; mend it")],
    ),
    "a.smk": ('rule a:\n    """Why it is."""\n    input: b,  # the source\n', [(2, "Why it is."), (3, "the source")]),
    "a.yaml": (
        "# A comment of\n# two lines.\na: 1 # a value\ndescription: One key.\nb: '#x'\n",
        [(1, "A comment of two lines."), (3, "a value"), (4, "One key.")],
    ),
    "a.json": ('{\n  "description": "One op.",\n  "description": {"type": "string"}\n}\n', [(2, "One op.")]),
    "a.md.j2": (TEMPLATE, [(2, "Text with x and one"), (2, "or another.")]),
    "a.html.j2": (PAGE, [(2, "A `x` in a text."), (3, "1"), (3, "A cell")]),
    "a.js": ("// A comment.\nlet a = 1; // a value\n", [(1, "A comment."), (2, "a value")]),
}


@pytest.mark.parametrize("name", CASES)
def test_texts_for_people_are_found_with_their_lines(tmp_path: Path, name: str) -> None:
    text, expected = CASES[name]
    assert [(sentence.line, sentence.text) for sentence in sentences(tmp_path, name, text)] == expected


def test_a_violation_is_told_with_file_line_and_sentence(tmp_path: Path) -> None:
    found = sentences(tmp_path, "a.md", f"Short.\n\nIt is {'very ' * 24}long.\n\nIt begins anew.\n")
    assert list(prose.described([sentence for sentence in found if sentence.is_long or sentence.worn])) == [
        "a.md: 1 sentences over 25 words, 1 worn words",
        f"  a.md:3: 27 words: It is {'very ' * 24}long.",
        "  a.md:5: anew: It begins anew.",
    ]
