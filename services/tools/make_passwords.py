"""`python -m services.tools.make_passwords FOLDER SERVICES`: generates the random passwords of a deployment, in files for the services.

FOLDER holds all of them, and SERVICES a folder for each service with the files of that service alone. Existing passwords are kept: to
change one, delete its file and run the command again. `--show` instead of SERVICES prints the passwords for logins.
"""

import os
import secrets
import sys
from pathlib import Path

from services.tools.rights import REDIS_RULES, RIGHTS, redis_users, user

#: File of each password for logins, and its purpose.
PASSWORDS = {
    "s3-access-key": "access key of the S3 server's administrator, and user of its console",
    "s3-secret-key": "secret key of the S3 server's administrator, and password of its console",
    "s3-secret-key-client": f"secret key for clients, with the access key {user('client')}",
    "grafana": "password of Grafana's user admin",
    "redis": "password of Redis's administrator",
    "explorer": "token of the explorer",
}
# Passwords of the components.
_OF_COMPONENTS = (
    *(f"s3-secret-key-{component}" for component in RIGHTS if component != "client"),
    *(f"redis-{component}" for component in REDIS_RULES),
)
# Users of Redis by component; a client checks the connection as the dispatcher.
_BROKERS = {"worker": "worker", "dispatcher": "dispatcher", "client": "dispatcher"}


def make(folder: Path, services: Path) -> None:
    """Generate missing passwords in `folder`, and write the files of each service to a folder in `services`."""
    for name in (*PASSWORDS, *_OF_COMPONENTS):
        if not (folder / name).exists():
            write(folder / name, secrets.token_hex(20))
    password = {name: (folder / name).read_text() for name in (*PASSWORDS, *_OF_COMPONENTS)}
    users = redis_users({component: password[f"redis-{component}"] for component in REDIS_RULES})
    files = {
        "redis": {"redis.conf": f"requirepass {password['redis']}\n{users}"},
        "minio": {name: password[name] for name in ("s3-access-key", "s3-secret-key")},
        "grafana": {"grafana": password["grafana"]},
    }
    for component in RIGHTS:
        files[component] = {"s3-access-key": user(component), "s3-secret-key": password[f"s3-secret-key-{component}"]}
        if account := _BROKERS.get(component):
            files[component]["broker"] = f"redis://{user(account)}:{password[f'redis-{account}']}@redis:6379/0"
    files["explorer"]["explorer"] = password["explorer"]
    for service, contents in files.items():
        (services / service).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write(services / service / name, text)


def show(folder: Path) -> None:
    """Print the passwords for logins."""
    for name, meaning in PASSWORDS.items():
        print(f"{(folder / name).read_text()}  {meaning}")


def write(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner and group."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o440), "w") as file:  # noqa: PTH123 - created with its final mode
        file.write(text)
    unfinished.replace(path)


def main(*arguments: str) -> int:
    """Run the command; returns its exit code."""
    if len(arguments) != 2:
        print("usage: python -m services.tools.make_passwords FOLDER SERVICES|--show", file=sys.stderr)
        return 2
    folder, services = arguments
    if services == "--show":
        show(Path(folder))
    else:
        make(Path(folder), Path(services))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
