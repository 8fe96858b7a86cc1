"""The words of a report that not everyone knows, each in a sentence, with the page of the documentation that has more.

A report is read for years, often without a network, so the page itself explains its words. Where the package names the
address of its documentation (`[project.urls]` in pyproject.toml), each explanation leads there too.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata


@dataclass(frozen=True)
class Term:
    """A word of the report.

    Attributes:
        id: Its anchor on the page of a report.
        words: A regular expression of the words that lead to it.
        meaning: A sentence.
        page: Its page in the documentation, as the site has it.
    """

    id: str
    words: str
    meaning: str
    page: str


TERMS = {
    "held-out images": Term(
        "held-out", "held[- ]out", "images that influenced nothing, and only measure", "concepts/certificate"
    ),
    "agreement": Term(
        "agreement", "agreement|agrees", "how often the student gives the teacher's answer", "concepts/certificate"
    ),
    "95 % interval": Term(
        "interval", "95 % interval|interval", "the range in which the figure for all such images very probably lies",
        "concepts/certificate",
    ),
    "seam": Term(
        "seam", "seam", "where the body of a network ends and its head begins; the head stays bit for bit",
        "concepts/seam",
    ),
    "feature error": Term(
        "feature-error", "feature error", "squared error at the seam; 0 is perfect, 1 no better than the mean feature",
        "concepts/certificate",
    ),
    "MACs": Term("macs", "MACs", "multiplications with their additions, counted for one image", "concepts/budgets"),
    "budget": Term("budget", "budget", "how large or how slow the student may be", "concepts/budgets"),
    "widths": Term("widths", "widths?", "how many channels a layer has", "concepts/groups_and_blocks"),
    "blocks": Term("blocks", "blocks?", "branches that can be left out whole", "concepts/groups_and_blocks"),
    "closed form": Term(
        "closed-form", "closed form", "each layer solved again by least squares, without training",
        "concepts/closed_form",
    ),
    "mimic": Term(
        "mimic", "mimic(?:s|ked|king)?|loss", "training the student's features to equal the teacher's; the loss is "
        "their squared difference", "concepts/mimic",
    ),
    "INT8": Term("int8", "INT8|quantised", "whole numbers of eight bits in place of floating point", "how_to/int8"),
}  # fmt: skip


def pieces(text: str) -> list[tuple[str, str]]:
    """Split a text at the terms in it: pairs of words and the anchor of their term, "" for all else.

    Only the first place of each term leads to it, and terms inside longer words do not.

    >>> pieces("Loss, and the loss of the seams at the seam")
    [('Loss', 'mimic'), (', and the loss of the seams at the ', ''), ('seam', 'seam')]
    """
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    end = 0
    for match in _pattern().finditer(text):
        anchor = list(TERMS.values())[match.lastindex - 1].id if match.lastindex else ""
        if anchor not in seen:
            seen.add(anchor)
            found += [(text[end : match.start()], ""), (match[0], anchor)]
            end = match.end()
    return [(words, anchor) for words, anchor in [*found, (text[end:], "")] if words]


@cache
def _pattern() -> re.Pattern[str]:
    return re.compile("|".join(rf"\b({term.words})\b" for term in TERMS.values()), re.IGNORECASE)


def documentation() -> str | None:
    """The address of the documentation, ending in a slash; None where the installed package names none."""
    try:
        named = metadata("mimicut").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    addresses = dict(line.split(", ", 1) for line in named)
    found = addresses.get("Documentation")
    return None if found is None else found.rstrip("/") + "/"
