"""Release 0.1.0 and this version on one store: each continues and reads what the other wrote.

The wheel of 0.1.0 is kept in tests/fixtures.
"""

import json
import shutil

import pytest

import memtail
from memtail.spec import Experiment
from tests.support import versions
from tests.support.cli import batches, version, write_spec


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return versions.release_0_1_0(tmp_path_factory.mktemp("release"))


def test_fingerprints_are_those_of_0_1_0(release):
    dataset = {"name": "digits"}
    declarations = [
        {"name": "plain", "dataset": dataset},
        {"name": "cnn", "dataset": dataset, "model": {"name": "cnn", "channels": [4]}, "record": {"margins": True}},
        {"name": "named", "dataset": dataset, "model": {"name": "resnet9", "options": {"width": 8}}, "execution": {"device": "cpu"}},
        {"name": "until", "dataset": dataset, "subsets": {"until": {"standard_error": 0.1}, "fraction": 0.5, "design": "balanced"}},
        *(
            {"name": name, "dataset": dataset, "training": {"schedule": {"name": name}, "augmentation": "flip"}}
            for name in ("constant", "step", "cosine", "linear")
        ),
    ]
    script = """
import json, sys
from memtail.experiment import Experiment
print(json.dumps([Experiment.parse(each).fingerprint("d") for each in json.load(sys.stdin)]))
"""
    output = versions.python(release, "-c", script, text=json.dumps(declarations))
    assert [Experiment.parse(each).fingerprint("d") for each in declarations] == json.loads(output)


def test_an_experiment_that_0_1_0_has_begun_is_extended_and_finished_to_equal_bits(release, tmp_path):
    spec = write_spec(tmp_path, subsets={"trials": 40})
    versions.python(release, "-m", "memtail", "run", spec, "--store", tmp_path / "begun")
    # as after a kill: the middle shard is missing, and nothing is published
    kept = batches(tmp_path / "begun")
    kept.pop(3).unlink()
    shutil.rmtree(tmp_path / "begun" / "experiments" / "digits" / "scores")
    held = [path.read_bytes() for path in kept]
    memtail.run(Experiment.load(write_spec(tmp_path, subsets={"trials": 60})), tmp_path / "begun")
    memtail.run(Experiment.load(write_spec(tmp_path, subsets={"trials": 60}, record={"scores": False})), tmp_path / "alone")
    assert [path.read_bytes() for path in kept] == held
    begun, alone = version(tmp_path / "begun"), version(tmp_path / "alone")
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in begun.iterdir()) == names
    for name in names:
        assert versions.without_conditions((begun / name).read_bytes()) == versions.without_conditions((alone / name).read_bytes()), name


def test_what_this_version_writes_without_later_keys_is_read_by_0_1_0(release, tmp_path):
    spec = write_spec(tmp_path, subsets={"trials": 40}, record={"scores": False})
    memtail.run(Experiment.load(spec), tmp_path / "store")
    held = batches(tmp_path / "store")
    spec = write_spec(tmp_path, subsets={"trials": 40})
    output = versions.python(release, "-m", "memtail", "run", spec, "--store", tmp_path / "store")
    assert "40" in output
    assert batches(tmp_path / "store") == held


def test_an_experiment_with_scores_is_left_alone_by_0_1_0(release, tmp_path):
    spec = write_spec(tmp_path, subsets={"trials": 40})
    memtail.run(Experiment.load(spec), tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "experiments").rglob("*")}
    with pytest.raises(AssertionError, match=r"unknown key 'record\.scores'"):
        versions.python(release, "-m", "memtail", "run", spec, "--store", tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "experiments").rglob("*")} == before
