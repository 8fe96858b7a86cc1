"""Plain data from files that may come from anyone, compared with the types that it is to have."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

_DEPTH = 100  # of lists and objects in one another: a result made from a result adds four. Source: assumption.


def read_plain(text: str, *, finite: bool = True) -> Any:
    """The plain data in a JSON text.

    Args:
        text: The text.
        finite: Whether NaN and infinities are refused.

    Raises:
        ValueError: It is none, or is nested deeper than anything of ours.
    """
    try:
        data = json.loads(text, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    level = [data]
    for _ in range(_DEPTH):
        level = [held for each in level for held in _held(each) if isinstance(held, (dict, list))]
        if not level:
            return data
    raise ValueError("lists or objects are nested too deeply")


def _held(data: Any) -> Any:
    return data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()


def _refuse(word: str) -> Any:
    raise ValueError(f"found {word}, expected finite numbers")


_adapter: Callable[[Any], TypeAdapter] = cache(TypeAdapter)  # made when first used: it takes some milliseconds


def faults(data: Any, kind: Any) -> list[str]:
    """What in plain data is not of the types of `kind`, a TypedDict or dataclass: a sentence for the first five faults.

    Numbers are not read from text, nor truth values from numbers.

    >>> faults({"run": "yes"}, dict[str, bool])
    ["run is 'yes': Input should be a valid boolean"]
    """
    try:
        _adapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[:5]
        return [_sentence(".".join(map(str, e["loc"])) or "it", e) for e in found]
    return []


def _sentence(place: str, error: Any) -> str:
    if error["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {repr(error['input'])[:60]}: {error['msg']}"
