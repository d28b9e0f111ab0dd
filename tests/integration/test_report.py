"""Reports of real runs: self-contained pages that agree with the scores and escape names."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import memtail
from memtail.errors import ScoresError, StoreError
from memtail.experiment_store import ExperimentStore
from memtail.experiment_store.replicas import compare
from memtail.figures.style import drawing
from memtail.report.pointer import ReportPointer, latest_report
from memtail.report.publish import is_current, publish_report
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.studies.result import StudyResult, write_result
from tests.support.arrays import write_tree
from tests.support.cli import command, write_spec

_MARKUP = '"><img src=x onerror=alert(1)> & <b>cat'


class Page(HTMLParser):
    """Elements and text of a page, parsed as by a browser."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        return [attributes for tag, attributes in self.elements if tag == "img"]


def page_of(store, name):
    pointer = latest_report(store, name)
    return store.get(keys.report(name, pointer.version) + pointer.page).decode()


def pairs_text(store):
    html = page_of(store, "digits")
    return " ".join(Page(html.partition('<section aria-labelledby="pairs">')[2].partition("</section>")[0]).text.split())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a run of digits and its report."""
    folder = tmp_path_factory.mktemp("report")
    model = {"name": "mlp", "hidden": [32]}
    experiment = Experiment.parse(
        {
            "name": "digits",
            "dataset": {"name": "digits"},
            "model": model,
            "training": {"epochs": 6},
            "subsets": {"trials": 40},
            "record": {"scores": True},  # selects pairs from few trials
        }
    )
    memtail.run(experiment, folder)
    publish_report(LocalStore(folder), "digits")
    return LocalStore(folder)


def test_the_page_is_self_contained(store):
    html = page_of(store, "digits")
    page = Page(html)
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r'"data:[^"]*"', "", html))
    assert not any(tag in ("script", "iframe", "object", "embed") for tag, _ in page.elements)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert len(links) > 50
    assert all(link.startswith("data:") for link in links)
    assert all(image["alt"] for image in page.images())
    assert len(html) < 5_000_000


def test_the_page_agrees_with_the_scores(store):
    page, scores = Page(page_of(store, "digits")), memtail.load_scores(store.root / "experiments/digits")
    text = " ".join(page.text.split())
    mem, error = scores.memorization["mem"], scores.memorization["mem_se"]
    for index in scores.most_memorized(1)["index"].tolist():
        assert f"training {index}" in text
        ends = f"95%: {scores.mem_lo[index]:.2f} to {scores.mem_hi[index]:.2f}"
        assert f"mem {mem[index]:.2f} ± {error[index]:.2f}{ends}" in text
    accuracy, its_error = scores.summary["test_accuracy"], scores.summary["accuracy_se"]["test_accuracy"]
    assert f"test accuracy{accuracy:.2%} ± {its_error:.2%}" in text
    assert re.search(rf"0\.25\s*{(mem >= 0.25).sum()}\s*{(mem >= 0.25).mean():.2%} ± \d", text)
    # lowest held-out accuracy first, ties by agreement on another class
    listed = re.findall(r"training (\d+)", text.partition("Labels to check")[2].partition("Convergence")[0])
    table = scores.to_pandas("memorization")
    doubtful = table[table["mem"] >= 0.5].sort_values(["p_out", "p_other", "mem"], ascending=[True, False, False], kind="stable")
    assert list(map(int, listed)) == doubtful["index"].tolist()[:30]
    assert len(listed) > 5
    # a warning, since 40 trials are few
    assert "These scores rest on only 40 trials" in text
    assert "false discovery rate" in text
    assert "trials: 40" in text


def test_the_pairs_are_the_selected_ones_beside_the_number_of_the_paper(store):
    text = pairs_text(store)
    scores = memtail.load_scores(store.root / "experiments/digits")
    table, summary = scores.strongest_pairs(20), scores.summary
    assert summary.selected_pairs.count > 0
    assert re.findall(r"test (\d+): ", text) == [str(j) for j in table["tt_idx"]]
    assert re.findall(r"training (\d+): ", text) == [str(i) for i in table["tr_idx"]]
    for infl, low, high, adjusted in zip(*(table[name] for name in ("infl", "infl_lo", "infl_hi", "infl_adjusted")), strict=True):
        assert f"infl {infl:.3f} (95%: {low:.3f} to {high:.3f}) adjusted {adjusted:.3f}, ".replace("-", "−") in text
    assert text.count("not confirmed chance among pairs this clear: ") == (~table["confirmed"]).sum()
    assert f"{summary.selected_pairs.count} pairs are selected" in text
    assert f"{summary.selected_pairs.confirmed} of them are confirmed" in text
    assert f"select {summary.pairs.count} pairs" in text
    assert f"trust the {summary.selected_pairs.count} selected ones" in Page(page_of(store, "digits")).text


def test_scores_without_a_selection_are_reported_with_the_pairs_of_the_paper(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "older")
    older = LocalStore(tmp_path / "older")
    key = keys.latest_scores("digits")
    pointer = json.loads(older.get(key))
    del pointer["summary"]["selected_pairs"]
    folder = keys.scores("digits", pointer["version"])
    older.put(key, json.dumps({**pointer, "files": [file for file in pointer["files"] if file != "pairs.parquet"]}).encode())
    older.put(folder + "summary.json", json.dumps(pointer["summary"]).encode())
    older.delete(folder + "pairs.parquet")
    publish_report(older, "digits")
    text = pairs_text(older)
    scores = memtail.load_scores(older.root / "experiments/digits")
    shown = re.findall(r"training (\d+): ", text)
    assert shown
    assert set(map(int, shown)) <= set(scores.pairs["tr_idx"].tolist())
    assert f"{scores.summary.pairs.count} of them have infl ≥ 0.15" in text
    assert "selected" not in Page(page_of(older, "digits")).text
    assert scores.strongest_pairs(3)["infl"].tolist() == scores.pairs["infl"][:3].tolist()


def test_equal_scores_give_equal_bytes(store):
    before = {path: path.read_bytes() for path in (store.root / "experiments/digits/report").rglob("*") if path.is_file()}
    publish_report(store, "digits")
    after = {path: path.read_bytes() for path in (store.root / "experiments/digits/report").rglob("*") if path.is_file()}
    assert after == before
    assert len(before) == 8
    assert {path.suffix for path in before} == {".html", ".svg", ".png", ".json"}


def test_the_pointer_ignores_unknown_fields_is_replaced_if_damaged_and_refused_if_newer(store, tmp_path):
    key, data = keys.latest_report("digits"), store.get(keys.latest_report("digits"))
    pointer = latest_report(store, "digits")
    assert pointer.to_json().encode() == data
    other = LocalStore(tmp_path)
    fields = json.loads(data)
    other.put(key, json.dumps({**fields, "added later": 1}).encode())
    assert latest_report(other, "digits") == pointer
    assert isinstance(pointer, ReportPointer)
    for damaged in (b"{", b"[]", b"{}", json.dumps({**fields, "files": 3}).encode()):
        other.put(key, damaged)
        assert latest_report(other, "digits") is None
    other.put(key, b'{"schema": 2}')
    with pytest.raises(StoreError, match=r"report/latest\.json: is of schema 2, this memtail reads 1"):
        latest_report(other, "digits")


def test_different_trainings_of_a_shard_make_the_report_outdated_and_are_shown_in_the_next(store):
    experiment_store = ExperimentStore(store, "digits")
    shard = experiment_store.committed()[0]
    batch = experiment_store.batch(shard, experiment_store.read_record())
    experiment_store.record_replica(compare(batch, replace(batch, membership=~batch.membership)))
    assert not is_current(store, "digits")
    publish_report(store, "digits")
    assert is_current(store, "digits")
    warning = f"1 shards were trained twice with different outcomes, of which the first counts (trials {shard.span})"
    assert warning in page_of(store, "digits")


def test_a_new_study_makes_the_report_outdated_and_is_shown_in_the_next(store):
    assert is_current(store, "digits")
    earlier = latest_report(store, "digits")
    result = StudyResult(store, "digits", "removal", "What <removal> costs", ["2.5 ± 0.2 points & no less"], 8, ["digits"], {}, {})
    with drawing(3, 2) as figure:
        figure.subplots().plot([1, 2], [3, 4])
    write_result(result, {"t": [1, 2]}, figure)
    assert not is_current(store, "digits")
    publish_report(store, "digits")
    assert is_current(store, "digits")
    assert latest_report(store, "digits").studies == {"removal": result.finished}
    page = Page(page_of(store, "digits"))
    assert "What <removal> costs" in page.text
    assert "2.5 ± 0.2 points & no less" in page.text
    drawn = base64.b64encode(result.figure_svg()).decode()
    assert any(image["src"] == f"data:image/svg+xml;base64,{drawn}" for image in page.images())
    # the previous version stays for its readers
    assert {*store.folders(keys.all_reports("digits"))} == {earlier.version, latest_report(store, "digits").version}


def test_a_study_of_earlier_scores_is_marked(store):
    for scores, marked in ((latest_report(store, "digits").scores, False), ("00000020-0123abcd", True)):
        result = StudyResult(store, "digits", "stability", "Who agrees", ["9.5 ± 0.2"], 8, ["digits"], {"scores": scores}, {})
        with drawing(3, 2) as figure:
            write_result(result, {"t": [1, 2]}, figure)
        publish_report(store, "digits")
        text = Page(page_of(store, "digits")).text
        assert "Based on 8 trained models" in text
        assert ("earlier scores, version 00000020-0123abcd" in text) == marked
        assert "few trials: digits (40)." in text


def test_scores_without_any_estimate_are_refused(tmp_path):
    np.save(tmp_path / "masks.npy", np.ones((4, 1438), np.bool_))
    subsets = {"design": "explicit", "masks": str(tmp_path / "masks.npy"), "trials": 4}
    experiment = Experiment.parse({"name": "all", "dataset": {"name": "digits"}, "training": {"epochs": 1}, "subsets": subsets})
    memtail.run(experiment, tmp_path / "store")
    with pytest.raises(ScoresError, match="'all' has no training example that some models saw and others did not"):
        publish_report(LocalStore(tmp_path / "store"), "all")


def test_names_of_classes_and_files_are_escaped(tmp_path):
    write_tree(tmp_path / "images", count=12)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").rename(tmp_path / "images" / split / _MARKUP)
    experiment = Experiment.parse(
        {
            "name": "folder",
            "dataset": {"name": "folder", "root": str(tmp_path / "images")},
            "model": {"name": "mlp", "hidden": [64]},
            "training": {"epochs": 30, "batch_size": 4},
            "subsets": {"trials": 40, "design": "balanced", "fraction": 0.5},
        }
    )
    memtail.run(experiment, tmp_path / "store")
    publish_report(LocalStore(tmp_path / "store"), "folder")
    page = Page(page_of(LocalStore(tmp_path / "store"), "folder"))
    assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in page.elements)
    assert any(_MARKUP in image["alt"] for image in page.images())
    assert f"{_MARKUP}/00" in page.text
    assert all(image["src"].startswith("data:image/") for image in page.images())


def test_the_command_makes_and_copies_the_report_and_names_missing_scores_on_one_line(store, tmp_path):
    result = command("report", "digits", "--store", store.root, "--fetch", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    pointer = json.loads(result.stdout)
    assert pointer["folder"] == str(tmp_path)
    assert sorted(pointer["files"]) == sorted(path.name for path in tmp_path.iterdir())
    (store.root / "experiments/digits/scores/latest.json").rename(tmp_path / "latest.json")
    result = command("report", "digits", "--store", store.root)
    (tmp_path / "latest.json").rename(store.root / "experiments/digits/scores/latest.json")
    assert result.returncode == 2
    assert "has no published scores yet" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_ends_with_a_report_unless_it_cannot_be_drawn(tmp_path):
    def run():
        return command("run", path, "--store", tmp_path / "store")

    path = write_spec(tmp_path, model={"hidden": [16]}, training={"epochs": 1}, subsets={"trials": 40})
    result = run()
    page = Path(re.search(r"^report: (.+)$", result.stdout, re.MULTILINE)[1])
    assert result.returncode == 0
    assert page.read_text().startswith("<!doctype html>")
    before = page.stat().st_mtime_ns
    assert f"report: {page}" in run().stdout
    assert page.stat().st_mtime_ns == before
    (tmp_path / "store/experiments/digits/report/latest.json").unlink()
    (tmp_path / "store/experiments/digits/studies/removal").mkdir(parents=True)
    (tmp_path / "store/experiments/digits/studies/removal/result.json").write_text("{")
    result = run()
    assert result.returncode == 0
    assert "report:" not in result.stdout
    assert "the report failed" in result.stderr
    assert len(result.stderr.splitlines()) == 1
