"""The GPU benchmark: every row at tiny sizes on the CPU, rows that fail, floors, and where data are found."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memtail.models import build_model
from memtail.spec import NamedModel
from tests.benchmarks.gpu import data
from tests.benchmarks.gpu.__main__ import ROWS
from tests.benchmarks.gpu.card import Card
from tests.benchmarks.gpu.results import Figure, Results, read, table
from tests.benchmarks.gpu.runner import Bench, Row, run_rows

COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]
ROOT = Path(__file__).parents[2]
CARDS = {name: Card(name, "cuda:0", "", rate, 790e12) for name, rate in (("H100", 3.0e12), ("H200", 4.3e12))}


def benchmark(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_measures_every_row(tmp_path):
    done = benchmark("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read(tmp_path / "results.jsonl")
    assert [line["row"] for line in lines if "row_seconds" in line] == [row.name for row in ROWS]
    assert {line["row"] for line in lines if "value" in line} == {row.name for row in ROWS}
    assert done.stdout == (tmp_path / "results.md").read_text()


def test_a_dry_run_of_a_row_writes_its_figures_and_the_table(tmp_path):
    done = benchmark("--dry-run", "--out", tmp_path, "influence")
    assert done.returncode == 0, done.stdout + done.stderr
    card, *figures, end = read(tmp_path / "results.jsonl")
    assert card["measured"].keys() == {"copy TB/s", "bfloat16 TFLOP/s"}
    assert [line["what"] for line in figures] == ["all influences on the device", "all influences on the CPU"]
    assert figures[0]["of_floor"] == pytest.approx(figures[0]["value"] / max(figures[0]["floor"].values()))
    assert (end["row"], end["error"]) == ("influence", None)
    assert benchmark("--table", tmp_path / "results.jsonl").stdout == done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_reported_in_one_line(tmp_path):
    done = benchmark("--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no CUDA device can be used" in done.stderr
    assert not done.stdout


def test_an_unknown_row_is_reported(tmp_path):
    done = benchmark("--out", tmp_path, "resnet8")
    assert done.returncode == 2
    assert "there is no row resnet8: rows are start, tests, mnist" in done.stderr


def fails(_):
    yield Figure("before the failure", 1.0)
    raise ValueError("two\nlines")


def ends(_):
    yield Figure("before the end", 1.0)
    os._exit(7)


def hangs(bench):
    subprocess.Popen(["sh", "-c", f"echo $$ >{bench.folder}/pid; exec sleep 600"])  # what it starts ends with it
    while not (bench.folder / "pid").exists():
        pass
    yield Figure("before the hang", 1.0)
    time.sleep(600)


def looks_back(bench):
    yield Figure("value of another row", bench.measured["fails", "before the failure"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_row_that_fails_ends_or_hangs_spoils_no_other(tmp_path):
    results, bench = Results(tmp_path), Bench(CARDS["H100"], tmp_path, True)
    began = time.monotonic()
    assert not run_rows([Row("fails", 60, fails), Row("looks back", 60, looks_back)], bench, results, tmp_path)
    assert not run_rows([Row("hangs", 2, hangs)], bench, results, tmp_path)
    assert not run_rows([Row("ends", 60, ends)], bench, results, tmp_path)
    assert time.monotonic() - began < 60
    lines = read(tmp_path / "results.jsonl")
    assert [line["what"] for line in lines if "what" in line] == [
        "before the failure", "value of another row", "before the hang", "before the end",
    ]  # fmt: skip
    errors = {line["row"]: line["error"] for line in lines if "row_seconds" in line}
    assert errors == {
        "fails": "ValueError: two lines",
        "looks back": None,
        "hangs": "ended after 2 s",
        "ends": "its process ended with code 7: see ends.log",
    }
    started = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not started.exists() or started.read_text().split()[2] == "Z"  # nobody may wait for it here
    shown = (tmp_path / "results.md").read_text()
    assert "* hangs, after 2" in shown
    assert "| looks back | value of another row | 1 s |" in shown


def test_the_table_of_a_run_that_was_cut_off_holds_what_was_written(tmp_path):
    results = Results(tmp_path)
    results.card(CARDS["H200"])
    results.figure("mnist", Figure("a run", 34.0, floor=CARDS["H200"].floor(1.0, 4.3e12 * 17), goal="60 s", note="good"))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"row": "resnet9", "wh')
    shown = table(read(tmp_path / "results.jsonl"))
    assert shown == (tmp_path / "results.md").read_text()
    assert "| mnist | a run | 34 s | 1.27e-15 FLOP, 17 bytes | 2 | 60 s | good |" in shown
    assert shown.startswith("H200, . Ceilings: 4.3 TB/s, 790 TFLOP/s in bfloat16")
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["operations_per_second"] == 790e12


@pytest.mark.parametrize(("name", "mnist"), [("H100", 25), ("H200", 17)])
def test_floors_are_those_of_the_ceilings(name, mnist):
    card, steps = CARDS[name], 2000 * 10 * 329
    assert card.dense_training([784, 512, 256, 10], 128, steps).seconds == pytest.approx(mnist, rel=0.03)
    network = build_model(NamedModel(name="resnet9"), (3, 32, 32), 10)
    floor = card.training(network, (3, 32, 32), 24 * 35_000)
    assert floor.by_operations == pytest.approx(2.42, rel=0.01)
    assert floor.seconds == max(floor.by_operations, floor.by_bytes)


def test_the_whole_run_takes_less_than_eight_minutes():
    assert sum(row.seconds for row in ROWS) <= 460  # the rest is for the start


def test_a_row_without_data_names_the_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMTAIL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "_SHARED", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^mnist is in none of {tmp_path}/data, .*: name its folder in MEMTAIL_DATA"):
        data.dataset("mnist", Bench(CARDS["H100"], tmp_path, False))


def test_cifar_is_found_as_an_archive_of_jpeg_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMTAIL_DATA", str(tmp_path))
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            file = tmp_path / "cifar10" / split / label / "0.jpg"
            file.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cifar10", "cifar10")
    for _ in range(2):
        found = data.dataset("cifar10", Bench(CARDS["H100"], tmp_path, False))
        assert found["name"] == "folder"
        assert (Path(found["root"]) / "train" / "dog" / "0.jpg").is_file()
