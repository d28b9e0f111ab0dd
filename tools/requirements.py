"""Prints what pyproject.toml asks for: `requirements.py base services` for the project itself and for an extra.

The images install this before the code is copied, and so install it again only when it has changed.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = {"base": project["dependencies"], **project["optional-dependencies"]}
for name in sys.argv[1:]:
    print(*groups[name], sep="\n")
