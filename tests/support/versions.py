"""Other versions of memtail for child processes: the wheel of 0.1.0, and patched copies of this checkout as later versions."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).parents[2]
_WHEEL = _PROJECT / "tests" / "fixtures" / "memtail-0.1.0-py3-none-any.whl"


def release_0_1_0(folder: Path) -> Path:
    """Unpack the wheel of 0.1.0, which holds `memtail` and `services`; returns the folder."""
    with zipfile.ZipFile(_WHEEL) as wheel:
        wheel.extractall(folder)
    return folder


def later_version(folder: Path, version: str, patches: Iterable[tuple[str, str, str]]) -> Path:
    """Copy this checkout's packages as another version; returns the folder.

    Args:
        folder: the copy.
        version: its version.
        patches: path of a file, a text in it, and the replacement.
    """
    for package in ("memtail", "services"):
        shutil.copytree(_PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = folder / f"memtail-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: memtail\nVersion: {version}\n")
    for file, old, new in patches:
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} does not have once: {old}"
        (folder / file).write_text(text.replace(old, new))
    return folder


def environment(code: Path) -> dict[str, str]:
    """Return the variables with which Python imports `memtail` and `services` from a folder, and everything else as usual."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (code, _PROJECT)))}


def python(code: Path, *arguments: object, text: str = "", env: Mapping[str, str] = os.environ) -> str:
    """Run Python with the packages of a folder; returns its output. An error fails the test."""
    command, complete = [sys.executable, *map(str, arguments)], {**env, **environment(code)}
    done = subprocess.run(command, cwd=code, env=complete, input=text, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_conditions(data: Any) -> Any:
    """Remove from the bytes of `summary.json` the key that 0.1.0 did not write; all else is returned unchanged."""
    if not isinstance(data, bytes) or b'"conditions"' not in data:
        return data
    content = json.loads(data)
    assert content.pop("conditions").keys() == {"device", "torch", "memtail"}
    return json.dumps(content, indent=1).encode()
