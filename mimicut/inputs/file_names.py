"""Names of a user's files in notes. They are written so that publishing leaves them out with certainty.

Each name, with what is said of that file alone, stands between “ and ”, which nothing else in a note does.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAMED = 5  # most names in one sentence
_LIST = re.compile(r"“[^”]*”(?:(?:, |; | = | like | is )“[^”]*”)*(?:, \.\.\.|; and \d+ more)?")
_ENDS_IN_LIST = re.compile(rf"(?:: |\(){_LIST.pattern}\)?\Z")


def quoted(name: str | Path) -> str:
    """A name as notes have it.

    >>> quoted("Anna “3”.png")
    '“Anna "3".png”'
    """
    return f"“{re.sub('[“”]', chr(34), str(name))}”"


def listed(names: Iterable[str | tuple[str, str]], joint: str = " like ") -> str:
    """The first names of a list. joint: what stands between two names of a pair: " like ", or " = ".

    >>> listed([("a.png", "b.png")] + [("c.png", "a.png")] * 5)[:40]
    '“a.png” like “b.png”, “c.png” like “a.pn'
    """
    every = [quoted(each) if isinstance(each, str) else joint.join(map(quoted, each)) for each in names]
    return ", ".join(every[:NAMED]) + (", ..." if len(every) > NAMED else "")


def without_names(note: str) -> str:
    """A note without the names in it.

    >>> without_names("1 image(s) equal in pixels to another (“a.png” = “b.png”, ...)")
    '1 image(s) equal in pixels to another (names left out)'
    >>> without_names("weights in “w.pth” converted from float16 to float32")
    'weights in (name left out) converted from float16 to float32'
    """

    def left_out(found: re.Match[str]) -> str:
        words = "names left out" if found[0].count("“") > 1 else "name left out"
        return words if note[: found.start()].endswith((": ", "(")) else f"({words})"

    return _LIST.sub(left_out, note)


def ends_in_names(note: str) -> bool:
    """Whether a note ends in a list of names that are written as here.

    >>> ends_in_names("1 of 9 images are blank: “a.png”"), ends_in_names("1 of 9 images are blank: a.png")
    (True, False)
    """
    return _ENDS_IN_LIST.search(note) is not None


def short_spec(source: Mapping[str, Any]) -> str:
    """The name of a teacher without the folders around what it names.

    Args:
        source: As `Teacher.to_json` gives it. A model of transformers keeps its whole name where the record says that
            it is from the hub: the name of a folder looks the same.

    >>> short_spec({"spec": "onnx:/home/ann/net.onnx"}), short_spec({"spec": "timm:resnet18"})
    ('onnx:net.onnx', 'timm:resnet18')
    """
    spec = str(source.get("spec") or "")
    found = re.match(r"[a-z_]{2,}:(local-dir:)?", spec)
    kind = found[0] if found else ""  # "timm:"; of "net.py:build" none
    name = spec.removeprefix(kind)
    files = kind in ("", "onnx:") or kind.endswith("local-dir:")
    if kind == "hf:":
        files = "hub" not in (source.get("options") or {})
    return kind + Path(name).name if files or Path(name).is_absolute() else spec
