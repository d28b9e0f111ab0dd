"""`python tools/chart-values.py`: writes the table of the chart's values into its README, from the comments in values.yaml.

A comment `# -- TEXT` stands before each value that has no parts, or before one that is documented as a whole.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "helm" / "memtail"
_BEGIN, _END = "<!-- values -->\n", "<!-- end of values -->\n"


def rows(text: str) -> list[tuple[str, Any, str]]:
    """List (name, default, description) of each value in the text of a values.yaml. Raises: ValueError: one has no description."""
    found: list[tuple[str, Any, str]] = []
    path: list[tuple[int, str]] = []  # keys that enclose the current line, with their indentation
    meaning, documented = "", sys.maxsize  # indentation of a value that is documented as a whole
    values = yaml.safe_load(text)
    for line in text.splitlines():
        if comment := re.match(r" *# -- (.+)", line):
            meaning = comment[1]
        elif key := re.match(r"( *)([\w-]+):", line):
            indentation = len(key[1])
            path = [each for each in path if each[0] < indentation] + [(indentation, key[2])]
            documented = documented if indentation > documented else sys.maxsize
            name = ".".join(each for _, each in path)
            if meaning:
                found.append((name, _at(values, path), meaning))
                meaning, documented = "", indentation
            elif documented == sys.maxsize and not line.endswith(":"):
                raise ValueError(f"{name} has no description: put a comment `# -- ...` before it")
    return found


def _at(values: Any, path: list[tuple[int, str]]) -> Any:
    for _, key in path:
        values = values[key]
    return values


def table(text: str) -> str:
    """Format the values in the text of a values.yaml as a Markdown table."""
    lines = [f"| `{name}` | `{json.dumps(default)}` | {meaning} |" for name, default, meaning in rows(text)]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *lines, ""])


def with_table(readme: str, text: str) -> str:
    """Insert the table of a values.yaml into a README, between its marks."""
    before, _, rest = readme.partition(_BEGIN)
    return before + _BEGIN + table(text) + _END + rest.partition(_END)[2]


if __name__ == "__main__":
    readme = CHART / "README.md"
    readme.write_text(with_table(readme.read_text(), (CHART / "values.yaml").read_text()))
