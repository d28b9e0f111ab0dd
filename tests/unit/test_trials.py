"""The wire format of trial batches."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.errors import ForeignObjectError, StoreError
from memtail.trials import Provenance, TrialBatch, pack, unpack
from tests.support.batches import random_batch as make


@given(
    k=st.integers(1, 9), n=st.integers(1, 40), q=st.integers(1, 40), seed=st.integers(0, 99), margins=st.booleans(), mistakes=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_read_back_as_written(k, n, q, seed, margins, mistakes):
    batch, (members, train, test) = make(k, n, q, seed, margins, mistakes)
    read = TrialBatch.from_bytes(batch.to_bytes())
    assert (unpack(read.membership, n) == members).all()
    assert (unpack(read.train_correct, n) == train).all()
    assert (unpack(read.test_correct, q) == test).all()
    assert list(read.metrics) == list(batch.metrics)
    assert read.provenance == batch.provenance
    assert read.shard == batch.shard
    assert (read.train_margin is None) != margins
    assert not margins or (read.test_margin == batch.test_margin).all()
    assert (read.train_score is None) != margins
    assert not margins or (read.test_score == batch.test_score).all()
    assert (read.train_mistakes is None) != mistakes
    assert not mistakes or (read.train_mistakes == batch.train_mistakes).all()
    assert read.to_bytes() == batch.to_bytes()


def test_outcomes_by_epoch_are_read_back_and_must_fit():
    batch, (_, train, _) = make(mistakes=False)
    correct = np.stack([pack(train), pack(~train)])
    recorded = replace(batch, snapshot_epochs=np.array([2, 7], np.int32), snapshot_correct=correct)
    read = TrialBatch.from_bytes(recorded.to_bytes())
    assert read.snapshot_epochs.tolist() == [2, 7]
    assert (unpack(read.snapshot_correct[0], batch.n_train) == train).all()
    assert (read.snapshot_correct == correct).all()
    for changes, message in (
        ({"snapshot_epochs": np.array([7, 2], np.int32)}, "snapshot_epochs is not int32 in ascending order"),
        ({"snapshot_epochs": np.array([2, 7])}, "snapshot_epochs is not int32 in ascending order"),
        ({"snapshot_epochs": None}, "snapshot_epochs is not int32"),
        ({"snapshot_correct": None}, r"snapshot_correct is not uint8 \[2, 3, 2\]"),
        ({"snapshot_correct": correct[:1]}, r"snapshot_correct is not uint8 \[2, 3, 2\]"),
    ):
        with pytest.raises(ForeignObjectError, match=message):
            replace(recorded, **changes)


def test_predicted_classes_must_match_the_number_of_misclassifications():
    batch, _ = make()
    with pytest.raises(ForeignObjectError, match=r"train_mistakes is uint16 \[\d+\], expected is uint16 \[\d+\]"):
        replace(batch, train_mistakes=batch.train_mistakes[1:])
    with pytest.raises(ForeignObjectError, match="train_mistakes is int64"):
        replace(batch, train_mistakes=batch.train_mistakes.astype(np.int64))


def test_plain_numpy_reads_the_documented_arrays():
    batch, (members, _, _) = make()
    with np.load(io.BytesIO(batch.to_bytes())) as archive:
        assert (np.unpackbits(archive["membership"], axis=1, count=13, bitorder="little") == members).all()
        assert archive["trial"].dtype == np.int32
        assert archive["trial"].tolist() == [10, 11, 12]
        assert json.loads(str(archive["metrics"]))[0]["test_accuracy"] == 0.75
        assert json.loads(str(archive["provenance"])) == {"fingerprint": "f"}


def test_a_fault_of_pythons_parser_is_none_of_the_batch(monkeypatch):
    (batch, _), load, faults = make(), np.load, [2]

    def faulty(*arguments, **options):
        if faults[0]:
            faults[0] -= 1
            raise SystemError("AST constructor recursion depth mismatch (before=36, after=33)")
        return load(*arguments, **options)

    data = batch.to_bytes()
    monkeypatch.setattr(np, "load", faulty)
    assert (TrialBatch.from_bytes(data).membership == batch.membership).all()
    faults[0] = 1000
    with pytest.raises(StoreError, match=r"AST constructor recursion depth mismatch"):
        TrialBatch.from_bytes(data)


def test_a_truncated_batch_is_named():
    data = make()[0].to_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(StoreError, match=r"trials/x\.npz: is truncated or corrupt"):
            TrialBatch.from_bytes(data[:size], "trials/x.npz")


def test_a_batch_that_grows_when_unpacked_or_holds_other_types_is_refused():
    batch = make(n=1 << 20)[0]
    with np.load(io.BytesIO(batch.to_bytes())) as archive:
        arrays = dict(archive)
    for changes, compressed, message in (
        ({"membership": np.zeros_like(arrays["membership"])}, True, "would grow when it is unpacked"),
        ({"membership": arrays["membership"].astype(np.float32)}, False, "membership is float32"),
        ({"trial": arrays["trial"] + 1}, False, "its metrics are not those of its 3 trials"),
        ({"membership": np.array([object()])}, False, "truncated or corrupt"),
    ):
        buffer = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(buffer, **(arrays | changes))
        with pytest.raises(ForeignObjectError, match=message):
            TrialBatch.from_bytes(buffer.getvalue())


def test_provenance_keeps_its_text_and_ignores_keys_of_other_versions():
    text = '{"fingerprint": "f", "phases": {"data": 0.5, "evaluation": 1.0}, "seconds": 1.25}'
    provenance = Provenance.from_json(text)
    assert (provenance.seconds, provenance.phases["data"], provenance.host) == (1.25, 0.5, None)
    assert provenance.to_json() == text
    resumed = Provenance("f", device="GPU", cpu="CPU, AVX2", devices=("other GPU, CPU, AVX2", "GPU, CPU, AVX2"))
    assert Provenance.from_json(resumed.to_json()) == resumed
    assert Provenance.from_json('{"command": ["train.py"], "fingerprint": "f"}') == Provenance("f")
    with np.load(io.BytesIO(make()[0].to_bytes())) as archive:
        arrays = dict(archive)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays | {"provenance": "[]"})
    with pytest.raises(ForeignObjectError, match="its provenance is not a JSON object"):
        TrialBatch.from_bytes(buffer.getvalue())
