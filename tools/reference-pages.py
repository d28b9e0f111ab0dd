"""`PYTHONPATH=. python tools/reference-pages.py`: writes the generated pages of docs/reference.

* `experiment-file.md` from the JSON schema of `memtail.Experiment`,
* `cli.md` from the Typer application,
* `environment.md` from the dataclasses in `memtail.settings` and `services.common.settings`.

`make docs` runs it; the pages are not under version control.
"""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from typer.cli import get_docs_for_click

import memtail.settings
import services.common.settings
from memtail.cli.app import app
from memtail.spec.experiment import Experiment

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_VARIABLE = re.compile(r"MEMTAIL_[A-Z0-9_]*[A-Z0-9]")

# Titles of the settings classes.
_TITLES = {
    "Settings": "Folders",
    "Limits": "Limits",
    "S3Settings": "S3",
    "ExplorerSettings": "Explorer",
    "ServiceSettings": "Services",
}

_EXPERIMENT = """# Experiment file

One YAML file declares an experiment; relative paths in it start from the file's folder. Only `name` and `dataset` are required. An unknown
key is an error, and so is a value outside the documented range. See [Write an experiment](../guides/experiments.md) for an introduction.
"""
_CLI = """`--store` names the folder or bucket with the results; `MEMTAIL_STORE` sets its default. Most commands print JSON with `--json`.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | `run`: trial batches were refused; `doctor`: a check failed; `watch`: an experiment needs help; or an unexpected error |
| 2 | invalid input, or a store or a dataset that cannot be used; one line on standard error names the value and the fix |
| 130, 143 | interrupted, terminated; nothing committed is lost |

"""
_ENVIRONMENT = """# Environment variables

A variable that holds a secret can be replaced by one with `_FILE` at its end, which names a file that holds the value.
[Compose](../guides/compose.md) has further variables for ports and images.
"""


def experiment_page() -> str:
    """Describe the keys of the experiment file, one section for each part."""
    schema = Experiment.model_json_schema()
    parts = {"Experiment": schema, **schema["$defs"]}
    done: list[str] = []
    waiting = ["Experiment"]
    while waiting:  # each part follows the one that first refers to it
        done.append(waiting.pop(0))
        waiting = [name for name in dict.fromkeys(_references(parts[done[-1]]["properties"])) if name not in done + waiting] + waiting
    return "\n".join([_EXPERIMENT, *(_part(name, parts) for name in done)])


def _references(schema: Any) -> list[str]:
    """List the names of the parts that a schema refers to, in order."""
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in _references(value)]
    return [name for each in schema for name in _references(each)] if isinstance(schema, list) else []


def _path_to(name: str, parts: dict[str, Any]) -> str:
    """Return the path of a part in the file, such as `training.optimizer`."""
    for parent, part in parts.items():
        for key, schema in part["properties"].items():
            if name in _references(schema):
                above = _path_to(parent, parts)
                return f"{above}.{key}" if above else str(key)
    return ""


def _kind(name: str, parts: dict[str, Any]) -> str | None:
    """Return the `name` that selects a part among several, or else the key that does, as code; None if there is only one part."""
    part, path = parts[name], _path_to(name, parts)
    kind = part["properties"].get("name", {}).get("const")
    if not kind and path and any(_path_to(other, parts) == path for other in parts if other != name):
        kind = next((key for key in part["required"] if key != "name"), None)
    return kind and f"`{kind}`"


def _part(name: str, parts: dict[str, Any]) -> str:
    part, path = parts[name], _path_to(name, parts)
    text, meanings = _docstring(part.get("description", ""))
    title = ": ".join(filter(None, [f"`{path}`", _kind(name, parts)])) if path else "Top level"
    if not path:
        text = ""  # already in the introduction of the page
    rows = []
    for key, schema in part["properties"].items():
        meaning = " ".join((schema.get("description") or meanings.get(key) or "").split())
        required = key in part.get("required", ())
        rows.append(f"| `{key}` | {_type_of(schema, parts)} | {'required' if required else _default(schema)} | {meaning} |")
    heading = f"## {title} {{ #{name.lower()} }}"
    return "\n".join([heading, "", *([text, ""] if text else []), "| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _type_of(schema: dict[str, Any], parts: dict[str, Any]) -> str:
    """Describe the type of a JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{_kind(name, parts) or 'mapping'}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type_of(each, parts) for each in schema[key] if each.get("type") != "null")
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_type_of(schema['items'], parts)}"
    if schema["type"] == "object":
        return "mapping"
    words = {"string": "text", "number": "number", "integer": "integer", "boolean": "`true`, `false`"}[schema["type"]]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return "path" if schema.get("format") == "path" else " ".join([words, ", ".join(limits)]).strip()


def _default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    if default is None or default == {} or "$ref" in schema or "discriminator" in schema or isinstance(default, dict):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Parse a Google-style docstring: its prose, and the descriptions under Attributes by name."""
    prose, _, rest = inspect.cleandoc(text).partition("\n\nAttributes:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    meanings: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\S)", section, flags=re.MULTILINE)[1:]:
        names, _, meaning = entry.partition(":")
        meanings |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return prose, meanings


def cli_page() -> str:
    """Describe the commands as Typer does, but with lists of links instead of its lists of commands, which truncate sentences."""
    command: Any = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="memtail", title="Command line")
    title, text = text.split("\n", 1)
    for path, group in (("memtail", command), *((f"memtail {name}", each) for name, each in command.commands.items() if _is_group(each))):
        lines = [f"* [`{name}`](#{f'{path} {name}'.replace(' ', '-')}): {_summary(each)}" for name, each in group.commands.items()]
        typers = r"\*\*Commands\*\*:\n\n(?:\* .*\n)+"
        text = re.sub(typers, "\n".join(["**Commands:**", "", *lines, ""]).replace("\\", r"\\"), text, count=1)
    return f"{title}\n\n{_CLI}{text.lstrip()}".rstrip() + "\n"


def _is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def _summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    return re.split(r"(?<=\.)\s", command.help.strip())[0]


def environment_page() -> str:
    """Describe the environment variables. Raises: ValueError: one of them has no description."""
    page = "\n".join([_ENVIRONMENT, *(_settings(module) for module in (memtail.settings, services.common.settings))])
    read = {name for module in (memtail.settings, services.common.settings) for name in _VARIABLE.findall(inspect.getsource(module))}
    if missing := sorted(name for name in read if name not in page and name.removesuffix("_FILE") not in page):
        raise ValueError(f"{', '.join(missing)}: not on the page: describe it in the docstring of its settings class")
    return page


def _settings(module: ModuleType) -> str:
    classes = [
        each for each in vars(module).values() if dataclasses.is_dataclass(each) and getattr(each, "__module__", "") == module.__name__
    ]
    return "\n".join(_settings_class(each) for each in classes)


def _settings_class(settings: Any) -> str:
    text, meanings = _docstring(settings.__doc__ or "")
    title = _TITLES[settings.__name__]
    variables = [entry for entry in dataclasses.fields(settings) if entry.metadata.get("variable") != ""]
    rows = [_variable_row(entry, meanings.get(entry.name, "")) for entry in variables]
    return "\n".join([f"## {title}", "", text, "", "| variable | default | meaning |", "|---|---|---|", *rows, ""])


def _variable_row(entry: Any, meaning: str) -> str:
    """Format a row of the table. Raises: ValueError: the variable has no name or no description."""
    # "`MEMTAIL_X` (remark): description"; the name may also be in the field's metadata
    named = re.fullmatch(r"((?:`[A-Z0-9_]+`(?:, )?)+)(?: \([^)]*\))?[:,] (.+)", meaning)
    variable = f"`{entry.metadata['variable']}`" if "variable" in entry.metadata else named and named[1]
    if not variable or not meaning:
        raise ValueError(f"{entry.name} has no description: describe its variable under Attributes in the docstring of its settings class")
    return f"| {variable} | {_default_of(entry.default)} | {named[2] if named else meaning} |"


def _default_of(value: Any) -> str:
    return (
        ""
        if value in ("", 0, None, dataclasses.MISSING) or value == math.inf
        else f"`{value:g}`"
        if isinstance(value, float)
        else f"`{value}`"
    )


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in {"experiment-file": experiment_page, "cli": cli_page, "environment": environment_page}.items():
        (FOLDER / f"{name}.md").write_text(page())


if __name__ == "__main__":
    main()
