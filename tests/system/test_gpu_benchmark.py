"""The GPU benchmarks: every step at tiny sizes on the CPU, and their messages if the GPU or a dataset is missing."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.benchmarks import gpu

COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]
ROOT = Path(__file__).parents[2]


def test_a_dry_run_passes_all_checks_and_prints_every_row():
    done = subprocess.run([*COMMAND, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count("ok: ") == 6
    for row in ("mnist-mlp", "cifar10-resnet9", "cifar100-resnet9", "influence"):
        assert row in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_reported_in_one_line():
    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert not done.stdout


def test_a_row_without_data_is_skipped_with_a_message(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEMTAIL_CACHE", str(tmp_path))
    sizes = gpu.Sizes(torch.device("cpu"), 1, 1, 1, 1, 1, 1, 1)
    assert gpu.mnist(sizes) == gpu.images("cifar100", sizes) == []
    assert "mnist: no data: row skipped" in (said := capsys.readouterr().out)
    assert "cifar100: no data" in said


def test_cifar_is_also_found_as_an_archive_of_jpeg_files(monkeypatch, tmp_path):
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
        assert (found := gpu.find("cifar10")) is not None
        assert (found.root / "train" / "dog" / "0.jpg").is_file()
    assert gpu.find("cifar100") is None
