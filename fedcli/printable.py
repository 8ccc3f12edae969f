"""What others wrote, as it may be shown: nothing in it steers a terminal, hides, or reorders what stands beside it."""

import json
import re
import reprlib
from collections.abc import Iterable
from typing import TypeVar

_HOSTILE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # order, no width
    "\u2028\u2029\ud800-\udfff]"  # lines of other kinds, halves of surrogate pairs
)

_MARKUP = str.maketrans({letter: f"\\{letter}" for letter in "\\`*[]|"} | {"<": "&lt;", ">": "&gt;"})
_URL = re.compile(r"(?i)\b(https?://)([^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?(#[^\s'\"<>]*)?")
_SECRET_PART = re.compile(r"[A-Za-z0-9_.~%=+-]{20,}")
"""A part of a URL's path that is no word."""
T = TypeVar("T")


_PLACES: dict[str, tuple[str, re.Pattern[str]]] = {}


def show_as(folder: str, address: str, but: Iterable[str]) -> None:
    """Show paths below a folder as what they stand for below an address, `but` those of these names."""
    kept = "|".join(map(re.escape, but))
    _PLACES[folder] = address, re.compile(rf"{re.escape(folder)}(?=$|[^/\w.-]|/(?!(?:{kept})\b))")


def printable(text: str) -> str:
    r"""Return a text whose control characters are written out, as \x1b; tabs and line feeds stay."""
    for folder, (address, pattern) in _PLACES.items():
        if folder in text:
            text = pattern.sub(address.replace("\\", r"\\\\"), text)
    return _HOSTILE.sub(_written_out, text)


def on_one_line(text: str) -> str:
    r"""Return a printable text without line feeds, which would let it pass for a line of its own."""
    return printable(text).replace("\n", "\\n")


def in_markdown(text: str) -> str:
    """Return a text for a cell or a line of Markdown, in which nothing is markup, HTML or the cell's end."""
    return on_one_line(text).translate(_MARKUP)


def in_csv(value: T) -> T | str:
    """Return a value for CSV, where a text that a spreadsheet would take for a formula has a ' in front."""
    if not isinstance(value, str):
        return value
    text = on_one_line(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text[:1] in ("\t", "|", "%") else text


def without_credentials(text: str) -> str:
    """Return a text in whose URLs users, passwords, queries and long parts of paths are masked: keys stand there."""
    return _URL.sub(_masked_url, text)


def shortened(value: object, most: int = 200) -> str:
    """Return a value's repr, cut in its middle: of what is nested, long or both, neither is made whole."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother, brief.maxlong = 3, most, most, most
    return brief.repr(value)[: 4 * most]


def printable_json(document: str) -> str:
    """Return the same JSON document with the same values, in which control characters are escaped as JSON has it."""
    return _HOSTILE.sub(lambda found: json.dumps(found[0])[1:-1], document)


def _masked_url(found: re.Match[str]) -> str:
    scheme, user, rest, query, fragment = found.groups(default="")
    host, slash, path = rest.partition("/")
    shown = "/".join("***" if _SECRET_PART.fullmatch(part) else part for part in path.split("/"))
    return f"{scheme}{'***@' * bool(user)}{host}{slash}{shown}{'?***' * bool(query)}{'#***' * bool(fragment)}"


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
