"""`python tools/requirements.py base services dev`: prints requirements of pyproject.toml.

Arguments are `base` (requirements of the project), `build` (of its build), extras and dependency groups; without arguments it prints all.
Requirements of the named groups must be in constraints.txt, which `make lock` writes.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def normalized(requirement: str) -> str:
    """Return the name of a package as spelled in constraints.txt."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())
groups = {
    "base": declared["project"]["dependencies"],
    "build": declared["build-system"]["requires"],
    **declared["project"]["optional-dependencies"],
    **declared["dependency-groups"],
}
requirements = [requirement for name in sys.argv[1:] or groups for requirement in groups[name]]
if len(sys.argv) > 1:
    locked = set(re.findall(r"^([\w.-]+)==", (PROJECT / "constraints.txt").read_text(), re.MULTILINE))
    if missing := [requirement for requirement in requirements if normalized(requirement) not in locked]:
        sys.exit(f"{', '.join(missing)}: not in constraints.txt: run `make lock`")
print(*requirements, sep="\n")
