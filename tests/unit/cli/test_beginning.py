"""What one asks of the command line before anything runs."""

import pytest
from typer.testing import CliRunner

from memtail.cli.app import app
from memtail.errors import SpecError


def said(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("name: e\ndataset: {name: digits}\n")
    return path


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_shown(option):
    assert said(option).startswith("memtail ")


def test_help_is_short_and_long_for_the_program_and_each_command():
    assert said("-h") == said("--help")
    assert said("run", "-h") == said("run", "--help")


def test_a_valid_file_is_shown_with_its_defaults_and_changes(spec):
    assert "epochs: 3" in said("validate", spec, "--set", "training.epochs=3")
    with pytest.raises(SpecError, match=r"e\.yaml: unknown key 'training\.epoch': did you mean 'epochs'\?"):
        said("validate", spec, "--set", "training.epoch=3")


def test_no_fewer_trials_are_asked_for_than_two(spec):
    with pytest.raises(SpecError, match=r"subsets\.trials: input should be greater than or equal to 2 \(got 1\)"):
        said("run", spec, "--trials", 1)
