"""Trainer of an experiment: the built-in one for images, a user's function, a user's command, or none; and the digest of a user's code."""

import hashlib
import json
import re
import shlex
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from memtail.errors import SpecError
from memtail.spec.base import Part

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and (duration := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*([smhd])", value)):
        return float(duration[1]) * _SECONDS[duration[2]]
    if isinstance(value, str):
        raise ValueError("is a number of seconds, or a text such as 90s, 30m, 6h or 2d")
    return value


_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _function(value: Any) -> Any:
    if isinstance(value, str) and not re.match(_FUNCTION, value):
        near = ":".join(value.rsplit(".", 1))  # a dot in place of the colon
        raise ValueError("is package.module:function" + (f", such as '{near}'" if re.match(_FUNCTION, near) else ""))
    return value


def _arguments(value: Any) -> Any:
    if isinstance(value, str):
        try:
            near = shlex.split(value)
        except ValueError:  # a quote without its other
            near = value.split()
        raise ValueError(f"is a list, such as {json.dumps(near)}")
    return value


_Timeout = Annotated[float, Field(gt=0), BeforeValidator(_seconds)]


class ImagesTrainer(Part):
    """The built-in trainer, which trains networks on images; `model` and `training` declare how.

    Attributes:
        name: the trainer.
    """

    name: Literal["images"] = "images"


class UserFunction(Part):
    """A Python function of the user's.

    Attributes:
        part: of the experiment, that the function is declared in.
        function: the function, as `package.module:function`.
        options: passed on to the function.
        code: files of the code, as patterns relative to `folder`; by default the function's source file.
        folder: folder in which the function is searched before the Python path; by default that of the experiment file.
    """

    part: ClassVar[str]

    function: Annotated[str, Field(pattern=_FUNCTION), BeforeValidator(_function)]
    options: dict[str, Any] = {}
    code: list[str] = []
    folder: Path | None = None


class FunctionTrainer(UserFunction):
    """A Python function that trains one trial, or its module's `train_many`, which trains a shard (see `memtail.TrainingTask`).

    Attributes:
        function: the function, as `package.module:function`.
        options: passed on to the function; part of the experiment's fingerprint.
        code: files of the code, as patterns relative to `folder`, whose content is part of the fingerprint; by default the function's
            source file.
        folder: folder in which the function is searched before the Python path; by default that of the experiment file, and
            `MEMTAIL_CODE` in a worker.
        timeout: longest time of a trial: seconds, or a text such as `90s`, `30m`, `6h` or `2d`; unlimited by default.
    """

    part: ClassVar[str] = "trainer"

    timeout: _Timeout | None = None


class CommandTrainer(Part):
    """A command that trains one trial.

    Attributes:
        command: the program and its arguments, started without a shell; `{code}` in them is the path of `folder`.
        options: passed on to the command in `task.json`; part of the experiment's fingerprint.
        code: files of the code, as patterns relative to `folder`, whose content is part of the fingerprint; by default the first argument
            that names a file in `folder`.
        timeout: longest time of a trial: seconds, or a text such as `90s`, `30m`, `6h` or `2d`; unlimited by default.
        folder: folder of the code; by default that of the experiment file, and `MEMTAIL_CODE` in a worker.
    """

    part: ClassVar[str] = "trainer"

    command: Annotated[list[str], Field(min_length=1), BeforeValidator(_arguments)]
    options: dict[str, Any] = {}
    code: list[str] = []
    timeout: _Timeout | None = None
    folder: Path | None = None


class ImportedTrainer(Part):
    """No trainer: the trials were trained elsewhere, and `memtail import` brought them.

    Attributes:
        imported: where they come from.
    """

    imported: str


def _kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Part) else ()
    return next((key for key in ("function", "command", "imported") if key in keys), "images")


def _one_kind(value: Any) -> Any:
    if isinstance(value, dict) and "function" in value and "command" in value:
        raise ValueError(f"has function {value['function']!r} and command {value['command']!r}: keep one of them")
    return value


UserTrainer = FunctionTrainer | CommandTrainer
UserCode = UserFunction | CommandTrainer
TrainerSpec = Annotated[
    Annotated[ImagesTrainer, Tag("images")]
    | Annotated[FunctionTrainer, Tag("function")]
    | Annotated[CommandTrainer, Tag("command")]
    | Annotated[ImportedTrainer, Tag("imported")],
    Discriminator(_kind),
    BeforeValidator(_one_kind),
]


def code_digest(code: UserCode, path: list[str]) -> str:
    """Return the SHA-256 (hex) of the names and contents of a user's code files. Imports none of them.

    Args:
        code: the declaration.
        path: folders of the Python path, on which the function's module is searched.

    Raises:
        SpecError: a pattern matches no file, the module is not found, or a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, file in sorted(code_files(code, path).items()):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise SpecError(f"{code.part}.code: {file} cannot be read ({error.strerror})") from None
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def code_files(code: UserCode, path: list[str]) -> dict[str, Path]:
    """Return the files that identify a user's code, by the names that are in its digest. Arguments and errors as of `code_digest`."""
    folder = code.folder or Path.cwd()
    files: dict[str, Path] = {}
    for pattern in code.code:
        try:
            matches = {file.relative_to(folder).as_posix(): file for file in folder.glob(pattern) if file.is_file()}
        except (ValueError, NotImplementedError) as error:
            raise SpecError(f"{code.part}.code: '{pattern}' is not a pattern relative to {folder}: {error}") from None
        if not matches:
            raise SpecError(f"{code.part}.code: no file in {folder} matches '{pattern}': fix the pattern, or set {code.part}.folder")
        files |= matches
    if files:
        return files
    if isinstance(code, UserFunction):
        source = find_module(code.function.partition(":")[0], [str(folder), *path], code.part)
        return {source.name: source}
    # an absolute path is that of an interpreter, which may differ from machine to machine
    parts = [part.replace("{code}/", "") for part in code.command]
    first = next((part for part in parts if not Path(part).is_absolute() and (folder / part).is_file()), None)
    if first is None:
        raise SpecError(
            f"trainer.code: no argument of the command names a file in {folder}: name the files of the code, whose content identifies the "
            f"experiment, or set trainer.folder"
        )
    return {Path(first).name: folder / first}


def find_module(module: str, path: list[str], part: str) -> Path:
    """Return the source file of a module without importing it or its packages.

    Args:
        module: its dotted name.
        path: folders to search.
        part: of the experiment, that declares the module.

    Raises:
        SpecError: there is no such module, or it has no source file.
    """
    places, spec = list(path), None
    for depth in range(1, len(module.split(".")) + 1):
        spec = PathFinder.find_spec(".".join(module.split(".")[:depth]), places)
        if spec is None:
            raise SpecError(
                f"{part}.function: there is no module '{module}' in {path[0]} or on the Python path: set {part}.folder to the folder "
                f"that holds it, or PYTHONPATH"
            )
        places = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise SpecError(f"{part}.function: module '{module}' has no Python source: name the files of its code in {part}.code")
    return Path(spec.origin)
