"""`python -m services.tools.make_passwords FOLDER`: makes the random passwords of a deployment once, in files that services read.

`python -m services.tools.make_passwords FOLDER --show` prints those that people need. To change one, remove its file and run it again.
"""

import os
import secrets
import sys
from pathlib import Path

#: The files with a password each, and whose it is.
PASSWORDS = {
    "s3-access-key": "access key of the S3 server, and user of its console",
    "s3-secret-key": "secret key of the S3 server, and password of its console",
    "grafana": "password of Grafana's user admin",
    "redis": "password of Redis",
}


def make(folder: Path) -> None:
    """Make the passwords that are missing, and the files that Redis and its clients read."""
    for name in PASSWORDS:
        if not (folder / name).exists():
            _write(folder / name, secrets.token_hex(20))
    redis = (folder / "redis").read_text()
    _write(folder / "redis.conf", f"requirepass {redis}\n")
    _write(folder / "broker", f"redis://:{redis}@redis:6379/0")


def show(folder: Path) -> None:
    """Print the passwords that people need."""
    for name, meaning in PASSWORDS.items():
        print(f"{(folder / name).read_text()}  {meaning}")


def _write(path: Path, text: str) -> None:
    """Write a file that its group may read, whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o440), "w") as file:  # noqa: PTH123 - with its mode from the start
        file.write(text)
    unfinished.replace(path)


if __name__ == "__main__":
    (show if "--show" in sys.argv[2:] else make)(Path(sys.argv[1]))
