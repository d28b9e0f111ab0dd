"""Near-duplicates between training and test set, and how much of the pairs and of the removal effect they make up.

That high-influence pairs are often copies of one image is a known criticism of the paper. Images are compared by their pixels, and by
the features of one model (see `memtail.studies.features`). An image is shrunk to 32 pixels a side if it is larger, shifted to mean 0 and
scaled to length 1, which leaves out brightness and contrast; the distance of two is the length of their difference, from 0 to 2. Every
image is compared with every training image, which takes a minute for 60,000 of them and days for a million.

Two images are near-duplicates if their distance is at most `nearness` times the median distance of a training image to its nearest
other. So the threshold has no unit, and is the dataset's own; the figure shows what it lets through.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.datasets import ImageDataset
from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore
from memtail.scores.fetch import open_scores
from memtail.storage import ObjectStore
from memtail.studies.intervals import CONFIDENCE, difference
from memtail.studies.removal import Removal, outcomes
from memtail.studies.result import StudyResult, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memtail.studies.features import Features

Space = Literal["pixels", "features"]

# Images are compared at so many pixels a side at most.
_SIDE = 32
# Images whose distances to all others are held in memory at a time, and pairs of images that are shown of each kind.
_BLOCK = 256
_SHOWN = 6


@dataclass(frozen=True)
class Distances:
    """In one space: of each image to its nearest training image, itself left out, and the threshold of near-duplicates.

    Attributes:
        train, test: float32 [n] and [q], the distances.
        train_nearest, test_nearest: int64 [n] and [q], the training images.
        threshold: at most so far apart are near-duplicates.
        pairs: float32 [p], the distances of the high-influence pairs.
    """

    train: npt.NDArray[np.float32]
    train_nearest: npt.NDArray[np.int64]
    test: npt.NDArray[np.float32]
    test_nearest: npt.NDArray[np.int64]
    threshold: float
    pairs: npt.NDArray[np.float32]


def measure(dataset: ImageDataset, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], nearness: float) -> Distances:
    """All nearest distances, and those of the pairs (train[p], test[p])."""
    base, queries = _unit(dataset.train_images), _unit(dataset.test_images)
    own, own_nearest = _nearest(base, base, same=True)
    other, other_nearest = _nearest(queries, base, same=False)
    pairs = _distance(queries, test, base, train)
    return Distances(own, own_nearest, other, other_nearest, nearness * float(np.median(own)), pairs)


def _unit(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 [N, D] of mean 0 and length 1; an image of one value stays 0."""
    flat = np.concatenate([_shrunk(images[at : at + _BLOCK]) for at in range(0, len(images), _BLOCK)])
    flat -= flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    np.divide(flat, length, out=flat, where=length > 0)
    return flat


def _shrunk(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 [N, D]: the pixels of images that are at most `_SIDE` a side, averages of pixels of larger ones."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    pooled = adaptive_avg_pool2d(pixels, (min(_SIDE, images.shape[1]), min(_SIDE, images.shape[2])))
    return np.asarray(pooled.flatten(1).numpy())


def _nearest(
    queries: npt.NDArray[np.float32], base: npt.NDArray[np.float32], same: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    nearest = np.empty(len(queries), np.int64)
    squares = np.einsum("ij,ij->i", base, base)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        apart = squares - 2 * (block @ base.T)  # without the query's own square, which changes no order
        if same:
            apart[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        nearest[start : start + _BLOCK] = apart.argmin(1)
    return _distance(queries, np.arange(len(queries)), base, nearest), nearest


def _distance(
    one: npt.NDArray[np.float32], of_one: npt.NDArray[np.int64], other: npt.NDArray[np.float32], of_other: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """float32 [p], from the images themselves: products lose what small distances have."""
    found = np.empty(len(of_one), np.float32)
    for start in range(0, len(found), _BLOCK):
        block = slice(start, start + _BLOCK)
        found[block] = np.linalg.norm(one[of_one[block]] - other[of_other[block]], axis=1)
    return found


def study_duplicates(
    store: ObjectStore, name: str, dataset: ImageDataset, features: "Features", removal: Removal | None, *, nearness: float
) -> StudyResult:
    """Look for near-duplicates, and write the result into the store.

    Args:
        store, name: the experiment.
        dataset, features: its images, and what one model makes of them.
        removal: the study of the pairs' removal, trained; None if there are no pairs.
        nearness: see above.

    Raises:
        ScoresError: the scores have changed since the removal was planned, or too many of its models diverged.
        StoreError: the store cannot be read or written.
    """
    record = ExperimentStore(store, name).read_record()
    scores = open_scores(store, name)
    if removal is not None and removal.scores != scores.folder.name:
        raise ScoresError(f"experiment '{name}' has other scores now than the models were trained for: run the study again")
    train, test = scores.pairs["tr_idx"], scores.pairs["tt_idx"]
    found: dict[Space, Distances] = {
        "pixels": measure(dataset, train, test, nearness),
        "features": measure(features.dataset, train, test, nearness),
    }
    mem = scores.memorization["mem"]
    twins = {space: each.pairs <= each.threshold for space, each in found.items()}
    either = twins["pixels"] | twins["features"]
    findings: list[str] = []
    measured: dict[str, Any] = {}
    for space, each in found.items():
        of_test, of_train = each.test <= each.threshold, each.train <= each.threshold
        findings.append(
            f"By {space}, {int(of_test.sum())} of {len(of_test)} test images ({of_test.mean():.2%}) and {int(of_train.sum())} of "
            f"{len(of_train)} training images ({of_train.mean():.2%}) have a near-duplicate among the training images "
            f"(distance at most {each.threshold:.3f}, {nearness:g} of the median to the nearest)."
        )
        measured[space] = {
            "threshold": each.threshold,
            "test": int(of_test.sum()),
            "train": int(of_train.sum()),
            "pairs": int(twins[space].sum()),
            "mean_mem_of_duplicates": float(np.nanmean(mem[of_train])) if np.isfinite(mem[of_train]).any() else None,
        }
    if len(train):
        findings.append(
            f"Of the {len(train)} high-influence pairs {int(twins['pixels'].sum())} are near-duplicates by pixels, "
            f"{int(twins['features'].sum())} by features; {int((~either).sum())} are neither."
        )
    trials, experiments = scores.summary.trials, [name]
    if removal is not None:
        loss, text = _without_duplicates(store, removal, np.unique(test[either]), test)
        findings.append(text)
        measured["removal"] = loss
        experiments.append(removal.experiment.name)
        trials += removal.experiment.subsets.trials
    result = StudyResult(
        store,
        name,
        "duplicates",
        "Near-duplicates, and what the pairs owe them",
        findings,
        trials,
        experiments,
        {"scores": scores.folder.name, "nearness": nearness, "features": features.dataset.fingerprint},
        {**measured, "pairs": len(train), "pairs_without": int((~either).sum())},
    )
    write_result(result, _table(found), _draw(record.experiment.name, dataset, found, scores.pairs))
    return result


def _without_duplicates(
    store: ObjectStore, removal: Removal, duplicated: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
) -> tuple[dict[str, Any], str]:
    """The loss without the pairs' training examples, on the test examples of some near-duplicate pair and on those of others only."""
    correct, counted = outcomes(store, removal)
    everything, without = (
        correct[place : place + removal.repeats][counted[place : place + removal.repeats]] for place in (0, removal.repeats)
    )
    influenced = np.unique(test)
    parts = {"duplicates": duplicated, "others": np.setdiff1d(influenced, duplicated)}
    q = correct.shape[1]
    losses = {part: difference(everything[:, chosen].sum(1) / q, without[:, chosen].sum(1) / q) for part, chosen in parts.items()}
    lost = (
        f"Without the training examples of all pairs models lose {losses['others']} points of test accuracy on the {len(parts['others'])}"
    )
    how = f"(± is half of a {CONFIDENCE:.0%} confidence interval, Welch's)."
    if len(duplicated):
        of_one = f"{losses['duplicates']} on the {len(duplicated)} that are of one"
        text = f"{lost} influenced test images that are of no near-duplicate pair, and {of_one} {how}"
    else:
        text = f"{lost} influenced test images, none of which is of a near-duplicate pair {how}"
    return {part: {"images": len(parts[part]), **vars(loss)} for part, loss in losses.items()}, text


def _table(found: dict[Space, Distances]) -> dict[str, Any]:
    """One row per image and space."""
    parts: dict[str, list[Any]] = {"space": [], "split": [], "index": [], "nearest_train": [], "distance": [], "near_duplicate": []}
    for space, each in found.items():
        for split, distance, nearest in (("train", each.train, each.train_nearest), ("test", each.test, each.test_nearest)):
            parts["space"].append(np.full(len(distance), space))
            parts["split"].append(np.full(len(distance), split))
            parts["index"].append(np.arange(len(distance)))
            parts["nearest_train"].append(nearest)
            parts["distance"].append(distance)
            parts["near_duplicate"].append(distance <= each.threshold)
    return {column: np.concatenate(arrays) for column, arrays in parts.items()}


def _draw(name: str, dataset: ImageDataset, found: dict[Space, Distances], pairs: dict[str, npt.NDArray[Any]]) -> "Figure":
    """Rows of images, the test image above its training image: the nearest by either space, then the pairs of greatest influence."""
    from memtail.figures.style import drawing

    rows: list[tuple[str, list[tuple[int, int, str]]]] = []
    for space, each in found.items():
        nearest = np.argsort(each.test, kind="stable")[:_SHOWN]
        shown = [(int(each.test_nearest[j]), int(j), f"{each.test[j]:.3f}") for j in nearest]
        rows.append((f"nearest by {space}\n(threshold {each.threshold:.3f})", shown))
    top = [
        (int(pairs["tr_idx"][p]), int(pairs["tt_idx"][p]), f"{found['pixels'].pairs[p]:.3f}, {found['features'].pairs[p]:.3f}")
        for p in range(min(_SHOWN, len(pairs["tr_idx"])))
    ]
    if top:
        rows.append(("greatest influence\n(pixels, features)", top))
    with drawing(1.2 * _SHOWN + 1.3, 2.1 * len(rows) + 0.3) as figure:
        grid = figure.subplots(2 * len(rows), _SHOWN, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        for row, (title, shown) in enumerate(rows):
            for axes, split in zip(grid[2 * row : 2 * row + 2, 0], ("test", "train"), strict=True):
                axes.set_ylabel(f"{title}\n{split}" if split == "test" else split, fontsize=8)
            for column, (i, j, distance) in enumerate(shown):
                for axes, image, label in (
                    (grid[2 * row, column], dataset.test_images[j], f"{j}: {dataset.classes[dataset.test_labels[j]]}"),
                    (grid[2 * row + 1, column], dataset.train_images[i], f"{i}: {dataset.classes[dataset.train_labels[i]]}"),
                ):
                    axes.imshow(image, cmap="gray" if image.shape[-1] == 1 else None, interpolation="nearest")
                    axes.set_title(label, fontsize=7, pad=2)
                grid[2 * row + 1, column].set_xlabel(distance, fontsize=7)
        figure.suptitle(f"{name}: test images above the training images that they are compared with, and distances")
    return figure
