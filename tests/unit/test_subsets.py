"""Membership: sizes, balance, purity."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.errors import SpecError
from memtail.spec import SubsetsSpec
from memtail.subsets import DESIGNS, check_trials, membership, subset_size


def spec(**parts):
    return SubsetsSpec(**{"trials": 100, **parts})


LABELS = np.arange(60) % 3
PUBLISHED_UNIFORM = [[119, 117], [121, 119], [180, 191]]
PUBLISHED_BALANCED = [[173, 238], [82, 255], [252, 179]]
RANDOM_DESIGNS = sorted(DESIGNS.keys() - {"explicit"})


def test_every_design_can_be_declared():
    assert set(get_args(SubsetsSpec.model_fields["design"].annotation)) == DESIGNS.keys()


@pytest.mark.parametrize("design", RANDOM_DESIGNS)
@given(
    n=st.integers(30, 90),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**64),
    trials=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_every_subset_has_exactly_m_examples(design, n, fraction, seed, trials):
    members = membership(spec(design=design, fraction=fraction, seed=seed), np.arange(n) % 3, trials)
    assert members.sum(1).tolist() == [subset_size(fraction, n)] * len(trials)


@pytest.mark.parametrize("design", RANDOM_DESIGNS)
def test_membership_of_a_trial_depends_on_seed_and_trial_alone(design):
    together = membership(spec(design=design), LABELS, range(40))
    backwards = membership(spec(design=design), LABELS, range(39, -1, -1))[::-1]
    alone = np.concatenate([membership(spec(design=design), LABELS, [trial]) for trial in range(40)])
    other_seed = membership(spec(design=design, seed=1), LABELS, range(40))
    assert (together == backwards).all()
    assert (together == alone).all()
    assert not (together == other_seed).all(axis=1).any()
    assert len(np.unique(together, axis=0)) == 40


def test_membership_equals_that_of_the_first_release():
    # These must never change: other machines recompute the membership of old trials.
    members = membership(spec(seed=7), np.zeros(16, np.int64), [0, 1, 12345])
    packed = [np.packbits(row, bitorder="little").tolist() for row in members]
    balanced = [
        np.packbits(row, bitorder="little").tolist()
        for row in membership(spec(seed=7, design="balanced"), np.zeros(16, np.int64), [0, 1, 12345])
    ]
    assert packed == PUBLISHED_UNIFORM
    assert balanced == PUBLISHED_BALANCED


@given(n=st.integers(2, 50), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 100), prefix=st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_balanced_counts_differ_by_one_at_most_in_every_prefix(n, fraction, seed, prefix):
    counts = membership(spec(design="balanced", fraction=fraction, seed=seed), np.zeros(n, np.int64), range(prefix)).sum(0)
    assert counts.max() - counts.min() <= 1


def test_stratified_is_balanced_within_each_class_and_takes_its_share():
    labels = np.repeat([0, 1, 2], [10, 30, 20])
    members = membership(spec(design="stratified", fraction=0.7), labels, range(33))
    for label, size in ((0, 7), (1, 21), (2, 14)):
        inside = members[:, labels == label]
        assert (inside.sum(1) == size).all()
        assert inside.sum(0).max() - inside.sum(0).min() <= 1


def test_uniform_includes_every_example_and_every_pair_at_the_expected_rate():
    members = membership(spec(fraction=0.7), np.zeros(30, np.int64), range(4000)).astype(float)
    assert np.abs(members.mean(0) - 0.7).max() < 5 * np.sqrt(0.21 / 4000)
    pairs = members.T @ members / 4000
    expected = (21 / 30) * (20 / 29)
    assert np.abs(pairs[~np.eye(30, dtype=bool)] - expected).max() < 5 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_balanced_keeps_pairs_as_separable_as_uniform_does(fraction):
    members = membership(spec(design="balanced", fraction=fraction), np.zeros(20, np.int64), range(4000)).astype(float)
    pairs = (members.T @ members / 4000)[~np.eye(20, dtype=bool)]
    m = round(fraction * 20)
    assert np.abs(pairs - m * (m - 1) / (20 * 19)).max() < 5 * np.sqrt(0.25 / 4000)


def test_explicit_masks_are_used_unchanged(tmp_path):
    masks = np.random.default_rng(0).random((5, 60)) < 0.5
    np.save(tmp_path / "masks.npy", masks)
    members = membership(spec(design="explicit", masks=tmp_path / "masks.npy", trials=5), LABELS, [3, 0])
    assert (members == masks[[3, 0]]).all()


def test_explicit_masks_of_the_wrong_shape_are_refused(tmp_path):
    np.save(tmp_path / "masks.npy", np.ones((5, 59), bool))
    with pytest.raises(SpecError, match=r"bool \[5, 59\], needed is bool \[trials, 60\]"):
        membership(spec(design="explicit", masks=tmp_path / "masks.npy", trials=5), LABELS, [0])
    np.savez(tmp_path / "masks.npz", a=np.ones(3))
    for name, message in (("masks.npz", "it is an .npz file"), ("gone.npy", "cannot be read")):
        with pytest.raises(SpecError, match=message):
            membership(spec(design="explicit", masks=tmp_path / name, trials=5), LABELS, [0])


def test_explicit_masks_may_leave_examples_out(tmp_path):
    np.save(tmp_path / "masks.npy", np.eye(2, 60, dtype=bool))
    check_trials(spec(design="explicit", masks=tmp_path / "masks.npy", trials=2), LABELS)
    with pytest.raises(SpecError, match="2 rows for 3 trials"):
        check_trials(spec(design="explicit", masks=tmp_path / "masks.npy", trials=3), LABELS)


def test_too_few_trials_for_an_estimate_are_refused_with_the_number_that_is_enough():
    with pytest.raises(SpecError, match=r"with 3 trials \d+ of 60 .* trials are enough"):
        check_trials(spec(trials=3), LABELS)
    with pytest.raises(SpecError, match="with 100 trials"):
        check_trials(spec(fraction=1e-7), np.arange(10**4) % 3)
    check_trials(spec(trials=60), LABELS)
    check_trials(spec(trials=2, design="balanced", fraction=0.5), LABELS)


def test_stratified_refuses_a_class_too_small_to_be_split():
    with pytest.raises(SpecError, match="of the 1 training examples of class 2"):
        check_trials(spec(design="stratified"), np.array([0] * 10 + [1] * 10 + [2]))


@pytest.mark.parametrize("top", [len(LABELS), 1000])
def test_a_ranking_of_all_examples_is_refused(top):
    check_trials(spec(until={"ranking": {"top": len(LABELS) - 1, "overlap": 0.9}}), LABELS)
    with pytest.raises(SpecError, match=rf"^subsets\.until\.ranking\.top: is {top}, and there are {len(LABELS)} training examples: choose"):
        check_trials(spec(until={"ranking": {"top": top, "overlap": 0.9}}), LABELS)
