"""Messages for users: validation errors in one line, and differences between two declarations."""

import difflib
import json
import re
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

# Number of known words that a message shows if none is near.
_MOST_CHOICES = 10


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return the faults of a validation error in one line each, with the nearest known word for each unknown key and value.

    Args:
        error: raised by `model`.
        model: the class that was validated.
    """
    lines = []
    for item in error.errors(include_url=False):
        location, fields = _locate(item["loc"], model)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(fields)}"
            lines.append(f"unknown key '{location}': {hint}")
        elif choices := _choices(item):
            word, known = choices
            lines.append(f"{location}: there is no '{word}': {_hint(word, known)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "model_type":
                one_of_several = item["loc"] and location.rpartition(".")[2] != str(item["loc"][-1])  # the last part is a union's tag
                keys = "keys" if one_of_several else f"the keys {', '.join(_locate((*item['loc'], ''), model)[1])}"
                message = f"takes {keys}, not a single value"
            value = item["input"]
            shown = f" (got {_short(value)})" if isinstance(value, str | int | float | bool | None) and item["type"] != "missing" else ""
            lines.append(f"{location}: {message[:1].lower()}{message[1:]}{shown}" if location else message)
    return lines


def _choices(item: Any) -> tuple[str, list[str]] | None:
    """Return an unknown word and the known ones, which pydantic writes as `'a', 'b' or 'c'`; None if the fault is another one."""
    given, known = item["input"], item.get("ctx", {})
    if item["type"] == "literal_error" and isinstance(given, str) and not str(item["loc"][-1]).startswith("literal["):
        return given, re.findall("'([^']*)'", known["expected"])
    if item["type"] == "union_tag_invalid" and (given == known["tag"] or (isinstance(given, dict) and given.get("name") == known["tag"])):
        return known["tag"], re.findall("'([^']*)'", known["expected_tags"])
    return None


def _hint(word: str, known: list[str]) -> str:
    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    if near:
        return f"did you mean '{by_lower_case[near[0]]}'?"
    more = f" and {len(known) - _MOST_CHOICES} others" if len(known) > _MOST_CHOICES else ""
    return f"known here: {', '.join(known[:_MOST_CHOICES])}{more}"


def _locate(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the dotted path of an error without pydantic's union tags, and the keys known beside its last part."""
    path: list[str] = []
    candidates: list[type[BaseModel]] = [model]
    known: list[str] = []
    for part in loc:
        if isinstance(part, int):  # an item of a list
            path.append(str(part))
            continue
        fields = {name: field for model in candidates for name, field in model.model_fields.items()}
        tagged = [model for model in candidates if _tag(model) == part]
        if len(candidates) > 1 and tagged:
            candidates = tagged
            continue
        known = list(fields)
        path.append(str(part))
        candidates = _models(fields[str(part)].annotation) if part in fields else []
    return ".".join(path), known


def _tag(model: type[BaseModel]) -> str:
    if "name" not in model.model_fields:
        return next(iter(model.model_fields))
    values = typing.get_args(model.model_fields["name"].annotation)
    return str(values[0]) if len(values) == 1 else "named"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the differences between two canonical declarations, as `subsets.fraction 0.7 -> 0.5`.

    Args:
        old: as `Experiment.canonical` returns it.
        new: as `old`.
        prefix: of the keys, with a dot at its end.
    """
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key} {_short(before)} -> {_short(after)}")
    return changes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
