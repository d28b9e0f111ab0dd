"""Names of the experiments that studies train."""

import pytest

from memtail.studies import STUDIES
from memtail.studies.experiment_names import derived_name, parent_of


@pytest.mark.parametrize("study", [name for name, study in STUDIES.items() if study.trains])
def test_the_parent_of_a_derived_name_is_the_experiment_studied(study):
    assert parent_of(derived_name("a.b", study, "0123abcdef")) == "a.b"


@pytest.mark.parametrize("name", ["digits", "digits.v2", "digits.removal", "digits.stability-0123abcd", "digits.removal-0123ABCD"])
def test_other_names_have_no_parent(name):
    assert parent_of(name) is None
