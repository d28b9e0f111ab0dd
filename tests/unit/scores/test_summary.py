"""Summaries of scores and the pointer to them: format, and compatibility with other versions of memtail."""

import json
from dataclasses import replace

import pytest

from memtail.scores.pointer import ScorePointer, latest_version, superseded
from memtail.scores.summary import ScoreSummary
from memtail.storage import keys
from memtail.storage.local import LocalStore

# As written by memtail 0.1.0.
SUMMARY = """{
 "schema": 1,
 "experiment": "digits",
 "fingerprint": "b3db",
 "trials": 998,
 "diverged": 2,
 "n_train": 1438,
 "n_test": 359,
 "without_estimate": 0,
 "in_subset_accuracy": 1.0,
 "held_out_accuracy": 0.97184686774942,
 "test_accuracy": 0.9669136490250696,
 "accuracy_se": {
  "in_subset_accuracy": 0.0,
  "held_out_accuracy": 0.00025034024021576025,
  "test_accuracy": 0.0001558955214254635
 },
 "mem_mean": 0.028044224422965464,
 "mem_share_at_least": {
  "0.1": 0.054242002781641166,
  "0.25": 0.03477051460361613,
  "0.5": 0.02086230876216968,
  "0.75": 0.016689847009735744,
  "0.9": null
 },
 "mem_se_quantiles": {
  "0.5": 0.0,
  "0.95": 0.012832215925519445,
  "1": 0.030261173615298575
 },
 "pairs": {
  "mem_threshold": 0.25,
  "infl_threshold": 0.15,
  "count": 16,
  "train_examples": 13,
  "test_examples": 12
 }
}"""
POINTER = '{\n "version": "00000998-d4c8",\n "published": "2026-11-26T22:47:02+00:00",\n "files": [\n  "a.npz",\n  "summary.json"\n ],\n'
POINTER += ' "summary": ' + SUMMARY.replace("\n", "\n ") + "\n}"


def test_the_format_is_that_of_the_first_release_to_the_byte():
    assert json.dumps(ScoreSummary.from_dict(json.loads(SUMMARY)).to_dict(), indent=1) == SUMMARY
    assert ScorePointer.from_json(POINTER).to_json() == POINTER


def test_unknown_keys_are_ignored_and_standard_errors_of_accuracies_may_be_missing():
    content = json.loads(SUMMARY)
    newer = {**content, "schema": 2, "median": 1, "pairs": {**content["pairs"], "confirmed": 3}}
    assert ScoreSummary.from_dict(newer) == replace(ScoreSummary.from_dict(content), schema=2)
    del content["accuracy_se"]
    assert ScoreSummary.from_dict(content).accuracy_se["test_accuracy"] is None
    assert ScorePointer.from_json(json.dumps({**json.loads(POINTER), "signed": True})) == ScorePointer.from_json(POINTER)


def test_the_selected_pairs_are_optional_and_read_as_written():
    content = json.loads(SUMMARY)
    assert ScoreSummary.from_dict(content).selected_pairs is None
    selected = {
        "mem_threshold": 0.25,
        "infl_threshold": 0.17,
        "false_discovery_rate": 0.1,
        "count": 50,
        "confirmed": 41,
        "train_examples": 30,
        "test_examples": 35,
    }
    summary = ScoreSummary.from_dict({**content, "selected_pairs": {**selected, "later": 1}})
    assert summary.selected_pairs.confirmed == 41
    assert summary.to_dict() == {**content, "selected_pairs": selected}
    with pytest.raises(KeyError):
        ScoreSummary.from_dict({**content, "selected_pairs": {"count": 50}})


def test_a_summary_is_also_the_mapping_that_the_file_holds():
    summary = ScoreSummary.from_dict(json.loads(SUMMARY))
    assert dict(summary) == json.loads(SUMMARY)
    assert (summary["trials"], summary["pairs"]["count"], summary.get("profile")) == (998, 16, None)
    assert "profile" not in summary
    assert (summary.accumulated_trials, summary.mem_share(0.25), summary.mem_se_quantile(1.0)) == (
        1000,
        0.03477051460361613,
        0.030261173615298575,
    )


@pytest.mark.parametrize(("trials", "n_test", "pairs"), [(499, 359, True), (499, 0, False), (500, 359, None)])
def test_a_warning_of_few_trials_names_them_and_what_to_do(trials, n_test, pairs):
    warning = replace(ScoreSummary.from_dict(json.loads(SUMMARY)), trials=trials, n_test=n_test).few_trials
    if pairs is None:
        assert warning is None
    else:
        assert "only 499 trials" in warning
        assert "raise subsets.trials" in warning
        assert ("pairs are chance" in warning) == pairs


@pytest.mark.parametrize("outcome", ["correct", "score"])
def test_imported_trials_are_not_advised_to_be_extended(outcome):
    content = {**json.loads(SUMMARY), "trials": 499, "outcome": outcome, "extendable": False}
    summary = ScoreSummary.from_dict(content)
    assert "subsets.trials" not in summary.few_trials
    assert "import all of them under another name" in summary.few_trials
    assert ScoreSummary.from_dict(summary.to_dict()) == summary


@pytest.mark.parametrize(("trials", "mark"), [(499, "few trials"), (500, None)])
def test_the_mark_of_few_trials_is_there_where_the_warning_is(trials, mark):
    assert replace(ScoreSummary.from_dict(json.loads(SUMMARY)), trials=trials).few_trials_mark == mark


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{}", POINTER[:-1], POINTER.replace('"count"', '"counted"'), POINTER.replace("files", "f")]
)
def test_a_damaged_pointer_reads_as_no_scores(tmp_path, text):
    store = LocalStore(tmp_path)
    assert latest_version(store, "digits") is None
    store.put(keys.latest_scores("digits"), POINTER.encode())
    assert latest_version(store, "digits").version == "00000998-d4c8"
    store.put(keys.latest_scores("digits"), text.encode())
    assert latest_version(store, "digits") is None


def test_the_current_and_the_previous_version_are_kept_and_so_are_later_ones():
    versions = ["00000004-d", "00000002-b", "00000001-a", "00000003-c", "00000005-e"]
    assert superseded(versions, "00000004-d") == ["00000001-a", "00000002-b"]
    assert superseded(versions, "00000002-b") == []
    assert superseded([], "00000002-b") == []
