"""`python -m services.tools.make_passwords FOLDER`: generates the random passwords of a deployment, in files that the services read.

Existing passwords are kept: to change a password, delete its file and run the command again. `--show` prints the passwords for logins.
"""

import os
import secrets
import sys
from pathlib import Path

#: File of each password, and its purpose.
PASSWORDS = {
    "s3-access-key": "access key of the S3 server, and user of its console",
    "s3-secret-key": "secret key of the S3 server, and password of its console",
    "grafana": "password of Grafana's user admin",
    "redis": "password of Redis",
    "explorer": "token of the explorer",
}


def make(folder: Path) -> None:
    """Generate missing passwords, and write the configuration files of Redis and its clients."""
    for name in PASSWORDS:
        if not (folder / name).exists():
            _write(folder / name, secrets.token_hex(20))
    redis = (folder / "redis").read_text()
    _write(folder / "redis.conf", f"requirepass {redis}\n")
    _write(folder / "broker", f"redis://:{redis}@redis:6379/0")


def show(folder: Path) -> None:
    """Print the passwords for logins."""
    for name, meaning in PASSWORDS.items():
        print(f"{(folder / name).read_text()}  {meaning}")


def _write(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner and group."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o440), "w") as file:  # noqa: PTH123 - created with its final mode
        file.write(text)
    unfinished.replace(path)


if __name__ == "__main__":
    (show if "--show" in sys.argv[2:] else make)(Path(sys.argv[1]))
