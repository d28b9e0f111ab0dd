"""Writes texts.jsonl: the first sentences of docstrings in Python's standard library, with the package they come from."""

import ast
import json
import sysconfig
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
library = Path(sysconfig.get_path("stdlib"))
rows = []
for package in PACKAGES:
    for path in sorted((library / package).rglob("*.py")):
        if "test" in path.relative_to(library).parts[1:]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                name = f"{path.relative_to(library).as_posix()}:{node.name}"
                rows.append({"text": " ".join(text.split("\n\n")[0].split()), "package": package, "name": name})
with Path("texts.jsonl").open("w", encoding="utf-8") as file:
    for number, row in enumerate(rows):
        file.write(json.dumps(row | {"split": "test" if number % 5 == 4 else "train"}) + "\n")
print(f"{len(rows)} texts of {len(PACKAGES)} packages in texts.jsonl")
