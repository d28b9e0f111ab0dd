"""Declaration of a trainer: what is accepted, and what identifies the user's code."""

import pytest

from memtail.errors import SpecError
from memtail.spec import CommandTrainer, Experiment, FunctionTrainer, ImagesTrainer
from memtail.spec.trainer import code_digest, find_module

DECLARED = {"name": "e", "dataset": {"name": "digits"}}


@pytest.fixture
def folder(tmp_path):
    """A folder with a package, a script, and an experiment file."""
    (tmp_path / "package/inner").mkdir(parents=True)
    (tmp_path / "package/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "package/inner/__init__.py").write_text("")
    (tmp_path / "package/inner/train.py").write_text("def train(task): ...")
    (tmp_path / "train.sh").write_text("exit 0")
    return tmp_path


def declared(trainer, **parts):
    return Experiment.parse({**DECLARED, **parts, "trainer": trainer})


def fingerprint(trainer):
    return declared(trainer).fingerprint("0" * 64)


def function(folder, **keys):
    return {"function": "package.inner.train:train", "folder": str(folder), **keys}


def test_the_built_in_trainer_is_the_default_and_no_part_of_the_fingerprint():
    experiment = Experiment.parse(DECLARED)
    assert experiment.trainer == ImagesTrainer()
    assert declared({"name": "images"}).fingerprint("0" * 64) == experiment.fingerprint("0" * 64)
    assert "trainer" not in experiment.canonical("0" * 64)
    assert "trainer" not in experiment.model_dump()


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [({"function": "a.b:c"}, FunctionTrainer), ({"command": ["sh", "train.sh"]}, CommandTrainer), ({"name": "images"}, ImagesTrainer)],
)
def test_a_trainer_is_read_again_from_what_is_written(trainer, kind):
    experiment = declared(trainer)
    assert type(experiment.trainer) is kind
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"function": "train"}, r"trainer\.function: .*\(got train\)"),
        ({"function": "a:b", "option": {}}, r"unknown key 'trainer\.option': did you mean 'options'\?"),
        ({"command": []}, r"trainer\.command: .*at least 1 item"),
        ({"function": "a:b", "timeout": "6 weeks"}, r"trainer\.timeout: is a number of seconds, or a text such as .* \(got 6 weeks\)"),
        ({"name": "image"}, r"trainer\.name: .*'images'"),
        ({"function": "a:b", "timeout": 0}, r"trainer\.timeout: .*greater than 0"),
    ],
)
def test_a_fault_is_reported_in_one_line(trainer, message):
    with pytest.raises(SpecError, match=message):
        declared(trainer)


@pytest.mark.parametrize("key", ["model", "training"])
def test_a_recipe_beside_user_code_is_refused(key):
    parts = {"model": {"name": "mlp", "hidden": [3]}, "training": {"epochs": 3}}
    with pytest.raises(SpecError, match=f"{key} is for the built-in trainer, and trainer.function replaces it: remove {key}"):
        declared({"function": "a:b"}, **{key: parts[key]})


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("6h", 21600), ("2d", 172800), (7, 7)])
def test_a_timeout_is_seconds_or_a_text(text, seconds):
    assert declared({"function": "a:b", "timeout": text}).trainer.timeout == seconds


def test_a_module_is_found_without_importing_its_packages(folder):
    assert find_module("package.inner.train", [str(folder)], "trainer") == folder / "package/inner/train.py"


@pytest.mark.parametrize("module", ["package.other", "missing", "package.inner.train.more"])
def test_a_missing_module_is_named(folder, module):
    with pytest.raises(SpecError, match=rf"trainer\.function: there is no module '{module}' in .*: set trainer\.folder"):
        code_digest(FunctionTrainer(function=f"{module}:train", folder=folder), [])


def test_a_module_without_source_is_refused():
    with pytest.raises(SpecError, match=r"module 'math' has no Python source: name the files of its code in trainer\.code"):
        code_digest(FunctionTrainer(function="math:sin"), __import__("sys").path)


def test_the_fingerprint_follows_options_and_code_but_not_place_or_timeout(folder, tmp_path_factory):
    first = fingerprint(function(folder))
    assert fingerprint(function(folder, timeout=5, options={})) == first
    assert fingerprint(function(folder, options={"lr": 1})) != first
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    folder.rename(elsewhere)
    assert fingerprint(function(elsewhere)) == first
    (elsewhere / "package/inner/train.py").write_text("def train(task): pass")
    assert fingerprint(function(elsewhere)) != first


def test_declared_files_are_the_code_by_name_and_content(folder):
    digest = code_digest(FunctionTrainer(function="package.inner.train:train", folder=folder, code=["package/**/*.py"]), [])
    (folder / "train.sh").write_text("other")
    assert code_digest(FunctionTrainer(function="package.inner.train:train", folder=folder, code=["package/**/*.py"]), []) == digest
    (folder / "package/inner/train.py").rename(folder / "package/inner/trains.py")
    assert code_digest(FunctionTrainer(function="package.inner.train:train", folder=folder, code=["package/**/*.py"]), []) != digest


@pytest.mark.parametrize(("pattern", "message"), [("*.go", "no file in .* matches"), ("/etc/*", "is not a pattern relative to")])
def test_a_pattern_without_files_is_refused(folder, pattern, message):
    with pytest.raises(SpecError, match=rf"trainer\.code: .*{message}"):
        code_digest(FunctionTrainer(function="package.inner.train:train", folder=folder, code=[pattern]), [])


@pytest.mark.parametrize("command", [["sh", "train.sh"], ["./train.sh"], ["sh", "-c", "true", "{code}/train.sh"]])
def test_the_first_file_of_a_command_is_its_code(folder, command):
    digest = code_digest(CommandTrainer(command=command, folder=folder), [])
    (folder / "train.sh").write_text("exit 1")
    assert code_digest(CommandTrainer(command=command, folder=folder), []) != digest


def test_a_command_without_files_must_name_its_code(folder):
    with pytest.raises(SpecError, match=r"trainer\.code: no argument of the command names a file in .*: name the files of the code"):
        code_digest(CommandTrainer(command=["true"], folder=folder), [])


def test_the_folder_of_the_code_is_that_of_the_experiment_file(folder):
    path = folder / "experiment.yaml"
    path.write_text("name: e\ndataset: {name: digits}\ntrainer: {function: 'package.inner.train:train'}\n")
    assert Experiment.load(path).trainer.folder == folder
    path.write_text("name: e\ndataset: {name: digits}\ntrainer: {function: 'inner.train:train', folder: package}\n")
    assert Experiment.load(path).trainer.folder == folder / "package"


def test_the_resolved_declaration_has_no_recipe_beside_user_code():
    text = declared({"function": "a:b"}).to_yaml()
    assert "model:" not in text
    assert "training:" not in text
