"""Studies of experiments whose trials were trained elsewhere."""

from types import SimpleNamespace

import pytest

from memtail.errors import SpecError
from memtail.spec import Experiment
from memtail.studies.architectures import _trained
from memtail.studies.retraining import require_built_in

IMPORTED = Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "trainer": {"imported": "authors aux_arrays.npz"}})


def test_what_trained_them_is_their_origin():
    assert _trained(IMPORTED) == "authors aux_arrays.npz"


def test_a_study_that_needs_a_model_says_that_they_were_imported():
    with pytest.raises(SpecError, match=r"experiment 'e' was imported \(authors aux_arrays\.npz\), and the study last-layer needs"):
        require_built_in(SimpleNamespace(experiment=IMPORTED), "last-layer")
