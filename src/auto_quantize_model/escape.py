"""Untrusted text made safe for the place that shows it: terminal, log, Markdown or spreadsheet.

In: any text, such as a sample's id, a model's name or a library's error. Out: text that is shown as it is and has no
other effect. JSON files are not changed, because they hold the raw data.
"""

import base64
import json
import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from markupsafe import Markup

HIDDEN = "***"
# C0 without tab and newline, DEL and C1, marks and overrides of direction, lone surrogates, and invisible tags.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
# Without the scheme: a search for a scheme takes time that grows with the square of a long word.
USER_IN_URL = re.compile(r"(://)[^\s/?#\"'<>]*@")
SIGNED = re.compile(
    r"([?&#][\w-]*(?:signature|token|credential|passw(?:or)?d|pwd|secret|policy|sig|key|auth)=)[^&\s\"'<>]+",
    re.IGNORECASE,
)
HEADER = re.compile(r"(authorization\W{1,8}(?:b[\"'])?(?:(?:basic|bearer|token)\s+)?)[\w.~+/=-]+", re.IGNORECASE)
BEARER = re.compile(r"(\bbearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE)
HUB_TOKEN = re.compile(r"()\bhf_\w{8,}")
# Without TOKENIZERS_PARALLELISM, HF_TOKEN_PATH and HF_HUB_DISABLE_IMPLICIT_TOKEN: they hold ordinary words and a path.
SECRET_NAME = re.compile("(?<!IMPLICIT_)TOKEN(?!IZ|_PATH)|PASSWORD|SECRET|API_?KEY", re.IGNORECASE)
SHORTEST_SECRET = 4  # characters; hiding a shorter secret would hide parts of ordinary text

# Characters that can begin Markdown: markup, tables, HTML, mathematics, and links that GitHub makes by itself.
IN_MARKDOWN = re.compile(
    r"[\\`*\[\]<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=\S)|(?<=www)\.|@(?=\w)|#(?=\w)", re.IGNORECASE
)
# Names that a code span can hold unchanged, in a table as well.
PLAIN = re.compile(r"[\w .,;()/+=-]+")
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def printable(text: str) -> str:
    r"""The text with control characters as visible escapes, such as `\x1b`; newlines and tabs stay."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str) -> str:
    """The text as `printable` returns it, on one line."""
    return printable(" ".join(text.split()))


def printable_document(document: Any) -> Any:
    """A JSON-able document in which every text, keys too, is as `printable` returns it."""
    if isinstance(document, dict):
        return {printable_document(key): printable_document(value) for key, value in document.items()}
    if isinstance(document, list):
        return [printable_document(value) for value in document]
    return printable(document) if isinstance(document, str) else document


def quoted(value: Any) -> str:
    """A value as a message shows it: short, on one line, without control characters and passwords."""
    as_python = isinstance(value, dict | list | str)
    # Secrets first: a cut text may have lost the @ that marks a password.
    text = redacted(repr(value) if as_python else json.dumps(value, default=str))
    most = 40 if isinstance(value, dict | list) else 60
    return text if len(text) <= most else f"{text[: most - 3]}..."


def redacted(text: str) -> str:
    """The text without passwords and tokens: those in URLs and headers, and those that the environment holds."""
    values = (value for name, value in os.environ.items() if SECRET_NAME.search(name) or "://" in value)
    if known := _known_secrets(tuple(values)):  # first: a URL with a decoded slash in its password would keep a part
        text = known.sub(HIDDEN, text)
    text = USER_IN_URL.sub(rf"\1{HIDDEN}@", text)
    for secret in (SIGNED, HEADER, BEARER, HUB_TOKEN):
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


@lru_cache(maxsize=4)
def _known_secrets(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for the secrets in environment variables, plain and as URLs and headers encode them."""
    secrets: set[str] = set()
    for value in values:
        secrets |= _credentials(value) if "://" in value else {value.strip()}
    forms = {form for secret in secrets for form in (secret, unquote(secret), quote(secret, safe=""))}
    forms |= {base64.b64encode(unquote(secret).encode()).decode() for secret in secrets}
    longest_first = sorted((form for form in forms if len(form) >= SHORTEST_SECRET), key=len, reverse=True)
    # A word that only contains a short password is not a secret. A percent-encoded colon does not belong to a word.
    begin = r"(?:(?<!\w)|(?<=%[0-9A-Fa-f]{2}))"
    return re.compile(begin + f"(?:{'|'.join(map(re.escape, longest_first))})" + r"(?!\w)") if longest_first else None


def _credentials(url: str) -> set[str]:
    """User and password of a URL, the password alone, and the parts of a password that broke the URL, as `/` may."""
    _, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest)[0]
    if "@" in authority:
        user = authority.rpartition("@")[0]
    elif "@" in rest and re.search(r":(?!\d*$)", authority):  # the text behind the colon is not a port
        user = rest.rpartition("@")[0]
    else:
        return set()
    name, _, password = user.partition(":")
    secret = password or name
    return {user, secret, *re.split("[/?#@:]", secret)}


def prose(text: str) -> Markup:
    """The text for a sentence of GitHub's Markdown, on one line; all characters that could be markup are entities.

    An entity is shown as its character and never begins markup. `<wbr>` separates texts that GitHub would turn into
    links, such as mentions and mail addresses.
    """

    def entity(found: re.Match[str]) -> str:
        return f"&#{ord(found[0])};" + ("<wbr>" if found[0] in "@#" else "")

    return Markup(IN_MARKDOWN.sub(entity, printable(re.sub(r"\s+", " ", text))))  # noqa: S704  escaped for Markdown right here


def code(text: str) -> Markup:
    """A name in GitHub's Markdown: a code span, or `<code>` with entities for a name that a code span cannot hold."""
    line = one_line(text)
    return Markup(f"`{line}`" if PLAIN.fullmatch(line) else f"<code>{prose(line)}</code>")  # noqa: S704  as in `prose`


def spreadsheet_cell(text: str) -> str:
    """A text that a spreadsheet shows and does not compute: a text that reads like a formula begins with a quote."""
    text = printable(text)
    return f"'{text}" if FORMULA.match(text) else text
