"""Experiments on datasets without a test set, or without labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from memtail.spec import Experiment
from tests.support.arrays import write_arrays

# Right about a text if the subset holds most of its pairs of neighbouring words. It insists on what an unlabelled dataset is.
_TRAIN = """
import numpy as np
import memtail

def pairs(text):
    words = text.split()
    return set(zip(words, words[1:]))

def train(task):
    data = task.dataset
    assert not data.labelled and data.classes == () and not data.train_labels.any()
    seen, noise = set().union(*map(pairs, data.train_texts[task.subset])), np.random.default_rng(task.seed)

    def correct(texts, needed):
        return [len(pairs(text) & seen) / len(pairs(text)) + noise.normal(0, 0.05) > needed for text in texts]

    outcome = {"train_correct": correct(data.train_texts, 0.5), "train_ids": [name.decode() for name in data.train_files]}
    if data.n_test:
        outcome["test_correct"] = correct(data.test_texts, 0.35)
    return memtail.Outcome(**outcome)
"""


def images_without_test_set(folder: Path, trials: int, **parts: Any) -> Experiment:
    """Write 40 training images without test images, and declare an experiment of the built-in trainer on them."""
    with np.load(write_arrays(folder / "whole.npz")) as whole:
        np.savez(folder / "images.npz", train_images=whole["train_images"], train_labels=whole["train_labels"])
    content = {"dataset": {"name": "arrays", "root": "images.npz"}, "model": {"name": "mlp", "hidden": [8]}, "training": {"epochs": 3}}
    return _experiment(folder, {"name": "images", **content, **parts}, trials)


def texts_without_labels(folder: Path, trials: int, test: int, **parts: Any) -> Experiment:
    """Write 60 training texts and `test` test texts without labels, and declare an experiment of a function on them."""
    rng, words = np.random.default_rng(0), [f"word{index}" for index in range(40)]
    dataset: dict[str, Any] = {"name": "table", "root": "train.jsonl", "columns": {"text": "text", "id": "id"}}
    for split, count in (("train", 60), ("test", test)):
        rows = [{"text": " ".join(rng.choice(words, 10)), "id": f"{split}/{index}"} for index in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if test:
        dataset["test"] = "test.jsonl"
    (folder / "words.py").write_text(_TRAIN)
    return _experiment(folder, {"name": "texts", "dataset": dataset, "trainer": {"function": "words:train"}, **parts}, trials)


def _experiment(folder: Path, content: dict[str, Any], trials: int) -> Experiment:
    content = {"subsets": {"trials": trials}, "execution": {"device": "cpu", "trials_per_shard": 16}} | content
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return Experiment.load(path)
