"""Responses of the explorer: pages and CSV, refusals, and names that are never interpreted as markup."""

import csv
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from memtail.errors import StoreError
from memtail.estimators.binomial import standard_error
from memtail.explorer import library as library_module
from memtail.explorer import score_cache, views
from memtail.explorer.app import create
from memtail.explorer.library import Library
from memtail.explorer.opened import Opened
from memtail.scores.fetch import open_scores
from memtail.spec import Experiment
from memtail.storage import UnreachableError, keys
from memtail.storage.local import LocalStore
from memtail.studies.result import StudyResult
from tests.support.explored import CLASSES, FORMULA, MARKUP, TRIALS, publish_random

HERE = "http://localhost"


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def links(self, pattern: str) -> list[str]:
        """First groups of the links that match."""
        return [found[1] for tag, each in self.elements if tag == "a" and (found := re.fullmatch(pattern, each["href"] or ""))]


@pytest.fixture(autouse=True)
def _time_to_read(monkeypatch):
    """Raise the timeout of pages that wait for scores, for busy machines."""
    monkeypatch.setattr(score_cache, "_TIMEOUT", 600.0)


@pytest.fixture(scope="module")
def client(explored):
    return TestClient(create(explored), base_url=HERE)


@pytest.fixture(scope="module")
def scores(explored):
    return open_scores(explored, "digits")


def page(client: TestClient, path: str, status: int = 200) -> Page:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return Page(answer.text)


def table(client: TestClient, path: str) -> list[dict[str, str]]:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


def copied(explored: LocalStore, root: Path, *names: str, kind: Any = LocalStore) -> Any:
    """Copy some of the experiments to a store that a test may change."""
    store = kind(root)
    for name in names:
        for key in list(explored.list(f"experiments/{name}/")):
            store.put(key, explored.get(key))
    return store


def until(met: Callable[[], bool]) -> None:
    """Wait for a background task."""
    deadline = time.monotonic() + 300
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def shown(client: TestClient, path: str) -> list[int]:
    """Training examples in a gallery, on all pages."""
    found = page(client, path)
    rows = [int(index) for index in found.links(r"/experiments/digits/train/(\d+)(?:\?.*)?")]
    after = [each["href"] for tag, each in found.elements if tag == "a" and each.get("rel") == "next"]
    return rows + (shown(client, after[0]) if after else [])


def test_the_first_page_lists_every_experiment_with_its_progress(client):
    found = page(client, "/")
    assert found.links("/experiments/([a-z]+)") == ["digits", "odd", "young"]
    progress = [(each["value"], each["max"]) for tag, each in found.elements if tag == "progress"]
    assert progress == [(str(TRIALS),) * 2, ("0", str(TRIALS)), ("0", str(TRIALS))]
    assert f"Scores of {TRIALS} trials" in found.text
    assert "No scores yet" in found.text
    rows = table(client, "/experiments.csv")
    assert [row["experiment"] for row in rows] == ["digits", "odd", "young"]
    assert 0 < float(rows[0]["test_accuracy_se"]) < float(rows[0]["test_accuracy"])
    assert rows[2]["test_accuracy_se"] == ""
    assert "No scores published yet" in page(client, "/experiments/young").text


@pytest.mark.parametrize(
    ("query", "chosen", "order"),
    [
        ("", lambda m: m["mem"] > -2, lambda m: -m["mem"]),
        ("?from=0.25&sort=least", lambda m: m["mem"] >= 0.25, lambda m: m["mem"]),
        ("?class=3&to=0.1&sort=hardest", lambda m: (m["label"] == 3) & (m["mem"] < 0.1), lambda m: m["p_out"]),
        ("?from=-0.05&to=0.05&sort=easiest", lambda m: (m["mem"] >= -0.05) & (m["mem"] < 0.05), lambda m: -m["p_out"]),
        ("?sort=class&from=0.5", lambda m: m["mem"] >= 0.5, lambda m: m["label"]),
        ("?sort=index&class=7", lambda m: m["label"] == 7, lambda m: m["index"]),
        ("?right-from=0.25&right-to=0.75&sort=hardest", lambda m: (m["p_out"] >= 0.25) & (m["p_out"] < 0.75), lambda m: m["p_out"]),
        ("?q=17", lambda m: m["index"] == 17, lambda m: m["index"]),
    ],
)
def test_a_gallery_and_its_csv_hold_the_selected_examples_in_order(client, scores, query, chosen, order):
    rows = shown(client, f"/experiments/digits{query}")
    mem = scores.memorization
    assert sorted(rows) == np.flatnonzero(chosen(mem)).tolist()
    assert len(rows)
    keys_ = order(mem)[rows]
    assert (np.diff(keys_) >= 0).all()
    ties = np.diff(keys_) == 0
    assert query.startswith("?sort=least") or (np.diff(-mem["mem"][rows])[ties] >= 0).all() or "index" in query
    listed = table(client, f"/experiments/digits/train.csv{query}")
    assert [int(row["index"]) for row in listed] == rows
    assert [float(row["mem"]) for row in listed] == mem["mem"][rows].tolist()
    assert {row["class"] for row in listed} == {str(label) for label in mem["label"][rows]}


def test_an_order_by_held_out_accuracy_shows_it(client, scores):
    found = page(client, "/experiments/digits?sort=hardest&right-from=0.7")  # whose memorization is at most 0.3
    mem = scores.memorization
    first = int(found.links(r"/experiments/digits/train/(\d+)(?:\?.*)?")[0])
    p, k = mem["p_out"][first], mem["k_out"][first]
    assert "held-out accuracy ± standard error" in found.text
    assert f"{p:.2f} ± {np.sqrt(p * (1 - p) / k):.2f}" in found.text


def test_each_bar_of_the_histogram_links_to_its_examples(client):
    found = page(client, "/experiments/digits?class=1")
    bars = [each for tag, each in found.elements if tag == "a" and "with memorization" in (each.get("aria-label") or "")]
    counts = [int(each["aria-label"].split()[0].replace(",", "")) for each in bars]
    assert sum(counts) == len(table(client, "/experiments/digits/train.csv?class=1"))
    for bar, count in zip(bars, counts, strict=True):
        assert count == len(shown(client, bar["href"]))


def test_the_published_csv_holds_no_formula(explored):
    (key,) = (key for key in explored.list(keys.all_scores("odd")) if key.endswith("/memorization.csv"))
    rows = list(csv.DictReader(io.StringIO(explored.get(key).decode())))
    assert {row["filename"][:5] for row in rows} == {CLASSES[0] + "/", f"'{CLASSES[1]}"}
    parquet = pyarrow.parquet.read_table(io.BytesIO(explored.get(key.replace(".csv", ".parquet"))))
    assert [row["filename"].removeprefix("'") for row in rows] == parquet["filename"].to_pylist()


@pytest.mark.parametrize("path", ["", "/train/3", "/test/3"])
def test_every_page_of_scores_warns_of_few_trials(client, scores, monkeypatch, path):
    warning = f"These scores rest on only {TRIALS} trials"
    assert warning in page(client, f"/experiments/digits{path}").text
    monkeypatch.setattr("memtail.scores.summary.FEW_TRIALS", TRIALS)
    assert warning not in page(client, f"/experiments/digits{path}").text


def test_the_list_of_experiments_marks_few_trials_and_says_why(client, monkeypatch):
    listed = page(client, "/")
    titles = [each["title"] for tag, each in listed.elements if tag == "span" and "title" in each]
    assert any(f"These scores rest on only {TRIALS} trials" in title for title in titles)
    assert all(f"few trials: {title}" in listed.text for title in titles)
    monkeypatch.setattr("memtail.scores.summary.FEW_TRIALS", 0)
    assert "few trials" not in page(client, "/").text


def test_tiles_have_the_interval_of_their_memorization(client, scores):
    first = int(scores.most_memorized(1)["index"][0])
    titles = [attributes["title"] for tag, attributes in page(client, "/experiments/digits").elements if "title" in attributes]
    assert f"95% interval: {scores.mem_lo[first]:.2f} to {scores.mem_hi[first]:.2f}" in titles


def test_examples_show_their_highest_and_lowest_influences(client, scores):
    train = int(scores.most_memorized(1)["index"][0])
    block = scores.influence(train=train)
    own, *rows = table(client, f"/experiments/digits/train/{train}.csv")
    mem = scores.memorization
    assert (int(own["tr_idx"]), own["tt_idx"], own["class"]) == (train, "", str(mem["label"][train]))
    for column in ("mem", "mem_se", "mem_lo", "mem_hi", "p_in", "p_out", "k_in", "k_out"):
        assert float(own[column]) == mem[column][train]
    assert float(own["p_out_se"]) == standard_error(mem["p_out"][train], mem["k_out"][train])
    found = page(client, f"/experiments/digits/train/{train}")
    assert f"{mem['mem_lo'][train]:.3f} to {mem['mem_hi'][train]:.3f}".replace("-", "−") in found.text
    assert found.links(r"/experiments/digits/test/(\d+)") == [row["tt_idx"] for row in rows]
    values = [float(row["infl"]) for row in rows]
    assert values == block.value[0, [int(row["tt_idx"]) for row in rows]].tolist()
    assert [float(row["infl_se"]) for row in rows] == block.standard_error[0, [int(row["tt_idx"]) for row in rows]].tolist()
    assert max(values) == block.value.max()
    assert min(values) == block.value.min()
    test = int(rows[0]["tt_idx"])
    own, *rows = table(client, f"/experiments/digits/test/{test}.csv")
    right = scores.statistics.correct_on_test[test] / TRIALS
    assert (int(own["tt_idx"]), own["tr_idx"], float(own["right"]), int(own["models"])) == (test, "", right, TRIALS)
    assert float(own["right_se"]) == standard_error(right, TRIALS)
    found = page(client, f"/experiments/digits/test/{test}")
    assert found.links(r"/experiments/digits/train/(\d+)") == [row["tr_idx"] for row in rows]
    column = scores.influence(test=test).value[:, 0]
    values = [float(row["infl"]) for row in rows]
    assert values == column[[int(row["tr_idx"]) for row in rows]].tolist()
    assert max(values) == np.nanmax(column)
    assert min(values) == np.nanmin(column)
    assert all(float(row["mem"]) == scores.memorization["mem"][int(row["tr_idx"])] for row in rows)


@pytest.mark.parametrize(("split", "own", "other"), [("train", "tr_idx", "tt_idx"), ("test", "tt_idx", "tr_idx")])
def test_selected_pairs_come_first_then_the_class_and_influences_of_chance_are_faded(client, scores, split, own, other):
    pairs = scores.selected_pairs
    index = int(pairs[own][0])
    first, *rows = table(client, f"/experiments/digits/{split}/{index}.csv")
    positive = [row for row in rows if row["selected"] == "true" or float(row["infl"]) > 0]
    partners = set(pairs[other][pairs[own] == index].tolist())
    count = len(partners)
    assert {int(row[other]) for row in positive[:count]} == partners
    assert [row["selected"] for row in rows] == ["true"] * count + ["false"] * (len(rows) - count)
    others = [row["class"] == first["class"] for row in positive[count:]]
    assert others == sorted(others, reverse=True)
    found = page(client, f"/experiments/digits/{split}/{index}")
    tiles = [each.get("class") for tag, each in found.elements if tag == "li" and each.get("class") in (None, "selected", "chance")]
    level = views.by_chance(scores.summary.n_test if split == "train" else scores.summary.n_train)
    beyond = [abs(float(row["infl"])) > level * float(row["infl_se"]) for row in rows]
    marks = ["selected" if row["selected"] == "true" else None if above else "chance" for row, above in zip(rows, beyond, strict=True)]
    assert tiles[-len(rows) :] == marks
    assert f"{count} selected pair" in found.text
    real = sum(mark != "chance" for mark in marks[: len(positive)])
    assert f"{real} of {len(positive)} more than chance" in found.text or real == len(positive)


def test_the_number_of_selected_pairs_is_on_the_pages_of_the_experiments(client, scores):
    selected = scores.summary.selected_pairs
    for path in ("/", "/experiments/digits"):
        assert f"{selected.count} selected pairs, {selected.confirmed} confirmed" in page(client, path).text


def test_scores_without_a_selection_show_influences_alone(client, scores, monkeypatch):
    opened = Opened(None, scores, None, "")
    with_pairs = views.influencers(opened, int(scores.selected_pairs["tt_idx"][0]))[0]
    assert with_pairs["selected"].any()
    monkeypatch.setitem(scores.__dict__, "selected_pairs", None)
    without = views.influencers(opened, int(with_pairs["tr_idx"][0]) % scores.summary.n_test)[0]
    assert not without["selected"].any()


@pytest.mark.parametrize("count", [2, 1_000])
def test_influences_of_chance_exceed_the_level_on_one_page_of_20(count):
    largest = np.random.default_rng(0).normal(size=(4_000, count)).max(1)
    assert (largest > views.by_chance(count)).mean() == pytest.approx(0.05, abs=0.012)


def test_images_are_those_of_the_dataset(client, digits):
    for split, images in (("train", digits.train_images), ("test", digits.test_images)):
        answer = client.get(f"/experiments/digits/images/{split}/5.png")
        assert answer.headers["content-type"] == "image/png"
        assert (np.asarray(Image.open(io.BytesIO(answer.content))) == images[5, :, :, 0]).all()


def test_an_example_without_an_estimate_is_marked_and_comes_last(client):
    found = page(client, "/experiments/odd")
    assert found.links(r"/experiments/odd/train/(\d+)")[-1] == "7"
    text = page(client, "/experiments/odd/train/7").text
    assert "none" in text
    assert "nan" not in text.lower()
    assert text.count("No estimate: every model saw it.") == 2


def test_names_of_files_and_classes_are_neither_markup_nor_formulas(client):
    paths = ["", "?q=onerror", "/train/0", "/train/4", "/test/1"]
    for path in paths:
        found = page(client, f"/experiments/odd{path}")
        assert not [each for tag, each in found.elements if tag == "b" or each.get("src") == "x" or "onerror" in each]
        assert CLASSES[0] in found.text
    assert MARKUP in page(client, "/experiments/odd/train/" + table(client, "/experiments/odd/train.csv?q=onerror")[0]["index"]).text
    rows = table(client, "/experiments/odd/train.csv?class=1")
    assert {row["class"] for row in rows} == {f"'{CLASSES[1]}"}
    names = {row["filename"] for row in rows}
    assert f"'{CLASSES[1]}/{FORMULA}" in names
    assert len(names) == 4
    assert [row["class"] for row in table(client, "/experiments/odd/test/0.csv")]


@pytest.mark.parametrize(
    "path",
    [
        "/experiments/none",
        "/experiments/..%2f..%2fetc",
        "/experiments/digits/train/1438",
        "/experiments/digits/train/-1",
        "/experiments/digits/train/x",
        f"/experiments/digits/train/{'9' * 5000}",
        "/experiments/digits/test/360.csv",
        "/experiments/digits/images/train/1438.png",
        "/experiments/digits/images/..%2f..%2fexperiment/0.png",
        "/experiments/digits/images/other/0.png",
        "/experiments/digits/report/report.html",
        "/experiments/digits/report/..%2f..%2fexperiment.json",
        "/experiments/digits/studies/none.svg",
        "/experiments/digits/studies/none.csv",
        "/experiments/young/train.csv",
        "/experiments/digits/",
        "/static/..%2fapp.py",
        "/static/../app.py",
        "/docs",
        "/none",
    ],
)
def test_unknown_urls_give_a_not_found_page(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "<h1>Not found</h1>" in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("query", ["from=x", "to=nan", "from=3", "class=-1", "sort=best", "page=0", "page=1e99", "q=" + "x" * 300])
def test_an_invalid_query_parameter_is_named(client, query):
    assert query.partition("=")[0].capitalize() + " is" in page(client, f"/experiments/digits?{query}", 400).text


def test_headers_restrict_browsers_to_the_explorers_own_files(client):
    for path in ("/", "/experiments/digits", "/experiments/digits/images/train/0.png", "/static/explorer.js", "/none"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["img-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["form-action"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    html = client.get("/experiments/digits").text
    assert not re.search(r"<script(?! src=)|\sstyle=|\son\w+=|<style|https?://", html.replace("http://www.w3.org", ""))


def test_head_requests_work_as_get_requests(client):
    for path in ("/", "/experiments.csv", "/experiments/digits", "/experiments/digits/test/3.csv", "/experiments/digits/images/test/3.png"):
        answer = client.head(path)
        assert answer.status_code == 200
        assert answer.content == b""


def test_an_internal_error_is_a_page_with_the_security_headers(explored, monkeypatch):
    monkeypatch.setattr("memtail.explorer.app.histogram", lambda *_: 1 / 0)
    answer = TestClient(create(explored), base_url=HERE).get("/experiments/digits")
    assert answer.status_code == 500
    assert "<h1>Internal error</h1>" in answer.text
    assert "division" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_newer_version_is_shown_once_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "_TTL", 0.0)
    store = LocalStore(tmp_path)
    spec = {"name": "digits", "dataset": {"name": "digits"}, "model": {"name": "mlp", "hidden": [16]}, "subsets": {"trials": 40}}
    publish_random(store, Experiment.parse(spec), 20)
    app = create(store)
    client = TestClient(app, base_url=HERE)
    assert "Scores of 20 trials" in client.get("/experiments/digits").text
    publish_random(store, Experiment.parse(spec), 40)
    assert "scores of 40 trials are published" in client.get("/experiments/digits").text
    until(lambda: "Scores of 40 trials" in client.get("/experiments/digits/train/0").text)


def test_pages_link_to_reports_and_studies(explored, tmp_path):
    store = LocalStore(tmp_path)
    for key in list(explored.list("experiments/digits/")):
        store.put(key, explored.get(key))
    store.put(keys.report("digits", "v1") + "report.html", b"<p style='color:red'>report")
    pointer = {"version": "v1", "files": ["report.html"], "page": "report.html", "scores": "00000001-0", "studies": {}}
    store.put(keys.latest_report("digits"), json.dumps(pointer).encode())
    result = StudyResult(store, "digits", "removal", "What <they> do", ["It costs 2.5 ± 0.2 points."], 30, ["digits"], {}, {})
    store.put(keys.study("digits", "removal") + "result.json", json.dumps(result.to_json()).encode())
    store.put(keys.study("digits", "removal") + "figure.svg", b"<svg/>")
    columns = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"theta": [0.25, 0.5], "arm": ["chosen", FORMULA]}), columns)
    store.put(keys.study("digits", "removal") + "result.parquet", columns.getvalue())
    client = TestClient(create(store), base_url=HERE)
    for path in ("/", "/experiments/digits"):
        assert page(client, path).links("/experiments/digits/(report/report.html|studies)") == ["report/report.html", "studies"]
    answer = client.get("/experiments/digits/report/report.html")
    assert answer.text.endswith("report")
    assert "script-src" not in answer.headers["content-security-policy"]
    text = page(client, "/experiments/digits/studies").text
    assert "What <they> do" in text
    assert f"30 trials · few trials: digits ({TRIALS})" in text
    assert "These scores rest on only" in text
    assert "It costs 2.5 ± 0.2 points." in text
    assert client.get("/experiments/digits/studies/removal.svg").headers["content-type"] == "image/svg+xml"
    rows = table(client, "/experiments/digits/studies/removal.csv")
    assert rows == [{"theta": "0.25", "arm": "chosen"}, {"theta": "0.5", "arm": f"'{FORMULA}"}]


def test_experiments_trained_by_studies_are_listed_under_their_parent(explored, tmp_path):
    store = LocalStore(tmp_path)
    spec = json.loads(explored.get(keys.experiment("young")))
    alone = "digits.last-layer-0123abcd"
    for name in ("young", "young.v2", "young.removal-0123abcd", alone):
        store.put(keys.experiment(name), json.dumps({**spec, "experiment": {**spec["experiment"], "name": name}}).encode())
    found = page(TestClient(create(store), base_url=HERE), "/")
    headings = [place for place, (tag, _) in enumerate(found.elements) if tag == "h2"]
    assert [found.elements[place + 1][1]["href"] for place in headings] == [
        f"/experiments/{name}"
        for name in (alone, "young", "young.v2")  # without its parent in this store, it is listed as an experiment
    ]
    (training,) = [place for place, (_, each) in enumerate(found.elements) if each.get("class") == "training"]
    assert found.elements[training + 2][1]["href"] == "/experiments/young.removal-0123abcd"
    assert headings[1] < training < headings[2]


def test_a_damaged_experiment_hides_no_other(explored, tmp_path):
    store = copied(explored, tmp_path, "young")
    store.put(keys.experiment("broken"), b"{")
    spec = json.loads(store.get(keys.experiment("young")))
    spec["experiment"]["model"]["name"] = "none"
    store.put(keys.experiment("unknown"), json.dumps(spec).encode())
    client = TestClient(create(store), base_url=HERE)
    found = page(client, "/")
    assert found.links("/experiments/([a-z]+)") == ["young"]
    assert "broken/experiment.json: is corrupt" in found.text
    assert "unknown: experiments/unknown/experiment.json: " in found.text
    assert "is corrupt" in page(client, "/experiments/broken", 503).text
    rows = {row["experiment"]: row["state"] for row in table(client, "/experiments.csv")}
    assert rows == {"young": "running", "broken": "damaged", "unknown": "damaged"}


def test_scores_are_shown_without_images_where_these_are_lost(explored, tmp_path, monkeypatch):
    cache = os.environ["MEMTAIL_CACHE"]
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path))
    client = TestClient(create(explored), base_url=HERE)
    found = page(client, "/experiments/digits")
    assert "No previews: dataset" in found.text
    assert "no preview" in found.text
    assert "class 3" in found.text
    assert client.get("/experiments/digits/images/train/0.png").status_code == 404
    assert len(table(client, "/experiments/digits/train.csv")) == 1438
    monkeypatch.setenv("MEMTAIL_CACHE", cache)  # restore the images
    monkeypatch.setattr(score_cache, "_RETRY_AFTER", 0.0)
    until(lambda: client.get("/experiments/digits/images/train/0.png").status_code == 200)


def test_an_unwritable_cache_costs_only_the_images(explored, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "file" / "cache"))
    text = page(TestClient(create(explored), base_url=HERE), "/experiments/digits").text
    assert f"No previews: {tmp_path}/file/cache/datasets cannot be written" in text
    assert "class 3" in text


class Watched(LocalStore):
    """Counts reads, and may be unreachable."""

    away, reads = False, 0

    def get(self, key, limit=None):
        self.reads += 1
        if self.away:
            raise UnreachableError("the bucket is unreachable")
        return super().get(key, limit)

    def exists(self, key):
        self.reads += 1
        return super().exists(key)


def test_an_outage_is_cached_and_hides_all_pages(explored, tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "_TTL", 600.0)
    store = copied(explored, tmp_path, "young", kind=Watched)
    store.away, store.reads = True, 0
    client = TestClient(create(store), base_url=HERE)
    for path in ("/", "/experiments.csv", "/experiments/young", "/experiments/young/images/train/0.png", "/experiments/young/train/0"):
        assert "The bucket is unreachable." in page(client, path, 503).text
    assert store.reads == 1


def test_unknown_names_cost_one_listing_and_are_not_cached(explored, tmp_path):
    store = copied(explored, tmp_path, "young", kind=Watched)
    store.reads, library = 0, Library(store)
    client = TestClient(create(store), base_url=HERE)
    for name in ("none", "other", "../young"):
        assert client.get(f"/experiments/{name}").status_code == 404
        with pytest.raises(StoreError, match="there is no experiment"):
            library.progress(name)
    assert store.reads == 0
    assert {name for name, _ in library._cache} == {""}


def test_damaged_scores_are_reported_until_they_are_replaced(explored, tmp_path, monkeypatch):
    monkeypatch.setattr(score_cache, "_RETRY_AFTER", 0.0)
    store = copied(explored, tmp_path, "digits")
    for file in ("memorization.parquet", "summary.json", "statistics.npz"):
        client = TestClient(create(store), base_url=HERE)
        (key,) = (key for key in store.list(keys.all_scores("digits")) if key.endswith(file))
        whole = store.get(key)
        store.put(key, whole[:20])
        for path in ("", "/train/0", "/train.csv"):
            assert f"{file}: is missing or damaged" in page(client, f"/experiments/digits{path}", 503).text
        store.put(key, whole)
        until(lambda client=client: client.get("/experiments/digits").status_code == 200)


def test_scores_that_take_long_are_read_in_the_background(explored, monkeypatch):
    arrived = threading.Event()
    opened = open_scores
    monkeypatch.setattr(score_cache, "open_scores", lambda *arguments: arrived.wait() and opened(*arguments))
    monkeypatch.setattr(score_cache, "_TIMEOUT", 0.0)
    client = TestClient(create(explored), base_url=HERE)
    assert "Reading the scores" in page(client, "/experiments/digits").text
    assert "are being read: reload" in page(client, "/experiments/digits/train/0", 503).text
    arrived.set()
    until(lambda: "training examples" in client.get("/experiments/digits").text)


def test_scores_used_last_stay_in_the_cache(explored, tmp_path, monkeypatch):
    store = copied(explored, tmp_path, "digits", "odd")
    for key in list(store.list("experiments/odd/")):
        store.put(key.replace("odd", "third", 1), store.get(key).replace(b'"name": "odd"', b'"name": "third"'))
    library = Library(store)
    digits, odd = library.open("digits"), library.open("odd")
    assert digits.size > odd.size > 0
    assert library.open("digits") is digits
    monkeypatch.setattr(score_cache, "_CACHE_BYTES", digits.size + odd.size)
    third = library.open("third")
    assert library.open("digits") is digits
    assert library.open("third") is third
    assert library.open("odd") is not odd


class Remote:
    """A store without a local folder, as a bucket is; records downloads."""

    def __init__(self, store):
        self._store, self.downloaded = store, []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def local_path(self, key):
        return None

    def download(self, key, path):
        self.downloaded.append(key.rpartition("/")[2])
        self._store.download(key, path)


def test_from_a_bucket_only_the_files_that_pages_need_are_downloaded(explored):
    store = Remote(explored)
    client = TestClient(create(store), base_url=HERE)
    for path in ("", "/train/3", "/test/3", "/train/3.csv"):
        assert client.get(f"/experiments/digits{path}").status_code == 200
    assert sorted(store.downloaded) == ["memorization.parquet", "pairs.parquet", "statistics.npz", "summary.json"]
