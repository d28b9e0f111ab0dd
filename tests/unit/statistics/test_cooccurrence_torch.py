"""Counts on torch's CPU device: their bits equal those of the compiled kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.estimators import Memorization, high_influence_pairs, top_influencers
from memtail.estimators import influence_torch as on_device
from memtail.statistics import cooccurrence
from memtail.statistics import cooccurrence_torch as device_counts
from memtail.statistics.accumulator import PackedTrials

shapes = {"t": st.integers(0, 200), "n": st.integers(1, 70), "q": st.integers(1, 70), "seed": st.integers(0, 10**6)}


def words(bits):
    """Bool [t, a] -> uint64 [ceil(t / 64), a]."""
    padded = np.pad(bits, ((0, -len(bits) % 64), (0, 0)))
    octets = np.packbits(padded, axis=0, bitorder="little").T
    return np.ascontiguousarray(np.ascontiguousarray(octets).view(np.uint64).T)


def statistics(seed, t, n, q):
    """Random statistics: some examples are in every subset or in none (no estimate), and few distinct rates give ties."""
    rng = np.random.default_rng(seed)
    M = rng.random((t, n)) < rng.choice([0.0, 0.5, 0.7, 1.0], n, p=[0.1, 0.4, 0.4, 0.1])
    M[:, n // 2 :] = M[:, : n - n // 2]
    return PackedTrials(  # type: ignore[call-arg]
        *(words(bits) for bits in (M, rng.random((t, n)) < 0.6, rng.random((t, q)) < 0.6)), words(np.ones((t, 1), bool))[:, 0]
    )


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Shrink blocks and chunks, so that small inputs span several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "_ROWS", 16)
        patch.setattr(on_device, "_OTHERS", 24)
        patch.setattr(device_counts, "_CHUNK", 2)
        yield


@given(W=st.integers(0, 5), a=st.integers(1, 70), b=st.integers(1, 70), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_counts_equal_those_of_the_compiled_kernel(W, a, b, seed):
    rng = np.random.default_rng(seed)
    left, right = (rng.integers(0, 2**64, (W, columns), dtype=np.uint64) for columns in (a, b))
    found = device_counts.count_block(device_counts.words_on(left, "cpu"), device_counts.words_on(right, "cpu")).numpy()
    assert found.dtype == np.int32
    assert found.shape == (a, b)
    assert (found == cooccurrence(left, right)).all()


@pytest.mark.parametrize(("a", "b"), [(1, 1), (17, 9), (33, 70), (0, 9), (17, 0), (0, 0)])
def test_products_have_the_shapes_that_cuda_requires(monkeypatch, a, b):
    product = torch._int_mm

    def checked(left, right):
        assert left.shape[0] > 16
        assert all(side % 8 == 0 for side in (*left.shape[1:], *right.shape))
        assert left.is_contiguous()
        assert right.T.is_contiguous()
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", checked)
    left, right = (np.full((1, columns), 2**64 - 1, np.uint64) for columns in (a, b))
    counts = device_counts.count_block(device_counts.words_on(left, "cpu"), device_counts.words_on(right, "cpu"))
    assert counts.shape == (a, b)
    assert (counts == 64).all()


@given(**shapes, k=st.integers(1, 30), on=st.sampled_from(["test", "train"]))
@settings(max_examples=60, deadline=None)
def test_top_influencers_are_equal_to_the_bit(t, n, q, seed, k, on):
    packed = statistics(seed, t, n, q)
    index, value = top_influencers(packed, k, on, device="cpu")
    expected_index, expected_value = top_influencers(packed, k, on)
    assert index.dtype == np.int64
    assert (index == expected_index).all()
    np.testing.assert_array_equal(value, expected_value)


@given(**shapes, classes=st.integers(1, 3), threshold=st.sampled_from([0.0, 0.1, 0.9]))
@settings(max_examples=60, deadline=None)
def test_high_influence_pairs_are_equal_to_the_bit(t, n, q, seed, classes, threshold):
    packed, rng = statistics(seed, t, n, q), np.random.default_rng(seed)
    mem = np.where(rng.random(n) < 0.1, np.nan, rng.random(n))
    memorization = Memorization(mem, mem, mem, mem, packed.k_in, packed.trials - packed.k_in)
    labels = rng.integers(0, classes, n), rng.integers(0, classes, q)
    with_device, without = (high_influence_pairs(packed, memorization, *labels, 0.25, threshold, device) for device in ("cpu", None))
    for name in ("train", "test", "influence", "influence_se", "mem", "mem_se"):
        found, expected = getattr(with_device, name), getattr(without, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
