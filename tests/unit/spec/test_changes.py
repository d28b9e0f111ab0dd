"""Keys that are set on the command line."""

import pytest

from memtail.errors import SpecError
from memtail.spec import Experiment
from memtail.spec.changes import changed

FILE = {"name": "a", "dataset": {"name": "digits"}, "training": {"epochs": 3, "augmentation": "flip"}}


@pytest.mark.parametrize(
    ("assignments", "part", "value"),
    [
        (["training.epochs=5"], "training", {"epochs": 5, "augmentation": "flip"}),
        (["subsets.trials=40", "subsets.until.standard_error=0.1"], "subsets", {"trials": 40, "until": {"standard_error": 0.1}}),
        (["model={name: mlp, hidden: [8]}"], "model", {"name": "mlp", "hidden": [8]}),
        (["name=b=c"], "name", "b=c"),
        (["subsets="], "subsets", None),
    ],
)
def test_keys_are_set_and_the_rest_stays(assignments, part, value):
    before = repr(FILE)
    after = changed(FILE, assignments)
    assert after[part] == value
    assert {key: after[key] for key in FILE if key != part} == {key: FILE[key] for key in FILE if key != part}
    assert repr(FILE) == before


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.epochs", "--set training.epochs: is no assignment: write KEY=VALUE, such as training.epochs=5"),
        ("=5", "--set =5: is no assignment"),
        ("training..epochs=5", "--set training..epochs=5: is no assignment"),
        ("training.epochs=[", "--set training.epochs=[: the value is not valid YAML: quote it"),
        ("training.augmentation.hue=1", "augmentation is 'flip' in the file, which holds no keys: set augmentation as a whole"),
    ],
)
def test_what_is_no_assignment_is_named(assignment, message):
    with pytest.raises(SpecError) as caught:
        changed(FILE, [assignment])
    assert message in str(caught.value)


def test_a_file_is_read_with_changes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndataset: {name: digits}\n")
    assert Experiment.load(path, ["subsets.trials=7"]).subsets.trials == 7
    with pytest.raises(SpecError, match=r"a\.yaml: unknown key 'subsets\.trial': did you mean 'trials'\?"):
        Experiment.load(path, ["subsets.trial=7"])
