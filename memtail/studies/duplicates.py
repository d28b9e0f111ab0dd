"""Duplicates study: near-duplicates of training images, and their share of the pairs and of the removal loss.

A known criticism of the paper is that high-influence pairs are often copies of one image. Both the pairs by its thresholds and the selected
pairs are examined; the removal is that of the former. Images are compared by their pixels, and by the
features of one model (see `memtail.studies.features`). An image is scaled down to 32 pixels a side if it is larger, shifted to mean 0 and
scaled to length 1, which removes brightness and contrast; the distance of two images is the length of their difference, from 0 to 2. All
images are compared with all training images, which takes a minute for 60,000 training images and days for a million.

Two images are near-duplicates if their distance is at most `nearness` times the median distance of a training image to its nearest
neighbour. So the threshold has no unit and adapts to the dataset; the figure shows the nearest images.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import typer

from memtail.datasets import ImageDataset, as_images
from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.fetch import open_scores
from memtail.storage import ObjectStore
from memtail.studies.intervals import CONFIDENCE, difference
from memtail.studies.options import REPEATS, ExperimentName, Repeats
from memtail.studies.removal_design import Removal, declare_removal
from memtail.studies.result import StudyResult, write_result
from memtail.studies.retraining import dataset_of, require_built_in, require_test_set
from memtail.studies.study import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Space = Literal["pixels", "features"]

# Largest side in pixels at which images are compared.
_SIDE = 32
# Images per block of distances, which bounds the memory, and pairs of images per row of the figure.
_BLOCK = 256
_SHOWN = 6


def prepare(
    store: ObjectStore,
    name: ExperimentName,
    *,
    nearness: Annotated[
        float,
        typer.Option(min=0, help="Largest distance of near-duplicates, as a multiple of the median distance to the nearest.", metavar="S"),
    ] = 0.33,
    repeats: Repeats = REPEATS,
) -> Prepared:
    """Prepare the study: declare the removal of the pairs' training examples, if there are pairs.

    Args:
        store: holds the experiment.
        name: the experiment.
        nearness: largest distance of near-duplicates, as a multiple of the median distance of a training image to its nearest neighbour.
        repeats: models per condition, at least 2.

    Raises:
        SpecError: the trainer is not the built-in one, or there are no test examples.
        DatasetError: the dataset does not hold images.
        ScoresError: there are no scores, or they are not final, or the pairs hold all training examples.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    record = ExperimentStore(store, name).read_record()
    require_built_in(record, "duplicates")
    require_test_set(record, "duplicates")
    dataset = as_images(dataset_of(store, record))
    has_pairs = len(open_scores(store, name).pairs["tr_idx"]) > 0
    removal = declare_removal(store, name, thetas=None, repeats=repeats) if has_pairs else None
    return Prepared(lambda: _evaluate(store, record, dataset, removal, nearness), removal.training(store) if removal else None)


@dataclass(frozen=True)
class Distances:
    """Distances in one space, of each image to the nearest other training image.

    Attributes:
        train, test: float32 [n] and [q], the distances.
        train_nearest, test_nearest: int64 [n] and [q], the nearest training images.
        threshold: largest distance of near-duplicates.
        pairs: float32 [p], the distances of the pairs.
    """

    train: npt.NDArray[np.float32]
    train_nearest: npt.NDArray[np.int64]
    test: npt.NDArray[np.float32]
    test_nearest: npt.NDArray[np.int64]
    threshold: float
    pairs: npt.NDArray[np.float32]


def measure(dataset: ImageDataset, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], nearness: float) -> Distances:
    """Measure the distances of all images and of the pairs.

    Args:
        dataset: the images, or their features.
        train: int64 [p], the training images of the pairs.
        test: int64 [p], the test images of the pairs.
        nearness: threshold, as a multiple of the median distance of a training image to its nearest neighbour.
    """
    base, queries = _unit(dataset.train_images), _unit(dataset.test_images)
    own, own_nearest = _nearest(base, base, same=True)
    other, other_nearest = _nearest(queries, base, same=False)
    pairs = _distance(queries, test, base, train)
    return Distances(own, own_nearest, other, other_nearest, nearness * float(np.median(own)), pairs)


def _unit(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale images to mean 0 and length 1, float32 [N, D]; a constant image stays 0."""
    flat = np.concatenate([_shrunk(images[at : at + _BLOCK]) for at in range(0, len(images), _BLOCK)])
    flat -= flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    np.divide(flat, length, out=flat, where=length > 0)
    return flat


def _shrunk(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale images down to at most `_SIDE` pixels a side by averaging, float32 [N, D]."""
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
        distances = squares - 2 * (block @ base.T)  # without the query's own square, which does not change the order
        if same:
            distances[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        nearest[start : start + _BLOCK] = distances.argmin(1)
    return _distance(queries, np.arange(len(queries)), base, nearest), nearest


def _distance(
    one: npt.NDArray[np.float32], of_one: npt.NDArray[np.int64], other: npt.NDArray[np.float32], of_other: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Distances, float32 [p], from differences of images: from products, small distances would be inaccurate."""
    distances = np.empty(len(of_one), np.float32)
    for start in range(0, len(distances), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances[block] = np.linalg.norm(one[of_one[block]] - other[of_other[block]], axis=1)
    return distances


def _evaluate(store: ObjectStore, record: Record, dataset: ImageDataset, removal: Removal | None, nearness: float) -> StudyResult:
    """Find near-duplicates and write the result.

    Raises:
        ScoresError: the scores changed after the removal was declared, or too many of its models diverged.
        StoreError: the store cannot be read or written.
    """
    from memtail.studies.features import features_of  # needs torch

    name = record.experiment.name
    features = features_of(store, record, lambda: dataset).dataset
    scores = open_scores(store, name)
    if removal is not None and removal.scores != scores.folder.name:
        raise ScoresError(f"experiment '{name}' has newer scores than the models were trained for: run the study again")
    tables = [scores.pairs] if scores.selected_pairs is None else [scores.pairs, scores.selected_pairs]
    train, test = (np.concatenate([table[column] for table in tables]) for column in ("tr_idx", "tt_idx"))
    spaces: dict[Space, Distances] = {
        "pixels": measure(dataset, train, test, nearness),
        "features": measure(features, train, test, nearness),
    }
    count = len(scores.pairs["tr_idx"])  # the pairs by the paper's thresholds, before the selected ones
    near = {space: each.pairs <= each.threshold for space, each in spaces.items()}
    duplicated, selected = ({space: each[part] for space, each in near.items()} for part in (slice(count), slice(count, None)))
    either = duplicated["pixels"] | duplicated["features"]
    findings = [_near_duplicates(space, each, nearness) for space, each in spaces.items()]
    measured: dict[str, Any] = {space: _measured(each, duplicated[space], scores.memorization["mem"]) for space, each in spaces.items()}
    findings += _of_pairs("selected pairs", selected) + _of_pairs("pairs by the paper's thresholds", duplicated)
    test = test[:count]
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
        "Near-duplicates and their share of the pairs",
        findings,
        trials,
        experiments,
        {"scores": scores.folder.name, "nearness": nearness, "features": features.fingerprint},
        {
            **measured,
            "pairs": count,
            "pairs_without": int((~either).sum()),
            "selected_pairs": len(selected["pixels"]),
            "selected_pairs_without": int((~(selected["pixels"] | selected["features"])).sum()),
        },
    )
    write_result(result, _table(spaces), _draw(name, dataset, spaces, scores.pairs))
    return result


def _near_duplicates(space: Space, distances: Distances, nearness: float) -> str:
    test, train = distances.test <= distances.threshold, distances.train <= distances.threshold
    return (
        f"By {space}, {int(test.sum())} of {len(test)} test images ({test.mean():.2%}) and {int(train.sum())} of {len(train)} training "
        f"images ({train.mean():.2%}) have a near-duplicate among the training images (distance at most {distances.threshold:.3f}, "
        f"{nearness:g} of the median distance to the nearest)."
    )


def _of_pairs(pairs: str, near: dict[Space, npt.NDArray[np.bool_]]) -> list[str]:
    """Say how many of some pairs are near-duplicates; nothing without pairs."""
    pixels, features = near["pixels"], near["features"]
    if not len(pixels):
        return []
    return [
        f"Of the {len(pixels)} {pairs}, {int(pixels.sum())} are near-duplicates by pixels and {int(features.sum())} by features; "
        f"{int((~(pixels | features)).sum())} are neither."
    ]


def _measured(distances: Distances, duplicated: npt.NDArray[np.bool_], mem: npt.NDArray[np.float64]) -> dict[str, Any]:
    test, train = distances.test <= distances.threshold, distances.train <= distances.threshold
    return {
        "threshold": distances.threshold,
        "test": int(test.sum()),
        "train": int(train.sum()),
        "pairs": int(duplicated.sum()),
        "mean_mem_of_duplicates": float(np.nanmean(mem[train])) if np.isfinite(mem[train]).any() else None,
    }


def _without_duplicates(
    store: ObjectStore, removal: Removal, duplicated: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
) -> tuple[dict[str, Any], str]:
    """Measure the loss without the pairs' training examples, on test examples with and without a near-duplicate pair."""
    correct, counted = removal.read_outcomes(store)
    everything, without, *_ = removal.split(correct, counted)
    parts = {"duplicates": duplicated, "others": np.setdiff1d(np.unique(test), duplicated)}
    q = correct.shape[1]
    losses = {part: difference(everything[:, chosen].sum(1) / q, without[:, chosen].sum(1) / q) for part, chosen in parts.items()}
    lost = (
        f"Without the training examples of all pairs by the paper's thresholds, models lose {losses['others']} points of test accuracy "
        f"on the {len(parts['others'])}"
    )
    method = f"(± is half of a {CONFIDENCE:.0%} confidence interval, Welch's)."
    if len(duplicated):
        on_duplicates = f"{losses['duplicates']} on the {len(duplicated)} in a near-duplicate pair"
        text = f"{lost} influenced test images in no near-duplicate pair, and {on_duplicates} {method}"
    else:
        text = f"{lost} influenced test images, none of which is in a near-duplicate pair {method}"
    return {part: {"images": len(parts[part]), **vars(loss)} for part, loss in losses.items()}, text


def _table(spaces: dict[Space, Distances]) -> dict[str, Any]:
    """One row per image and space."""
    parts: dict[str, list[Any]] = {"space": [], "split": [], "index": [], "nearest_train": [], "distance": [], "near_duplicate": []}
    for space, each in spaces.items():
        for split, distance, nearest in (("train", each.train, each.train_nearest), ("test", each.test, each.test_nearest)):
            parts["space"].append(np.full(len(distance), space))
            parts["split"].append(np.full(len(distance), split))
            parts["index"].append(np.arange(len(distance)))
            parts["nearest_train"].append(nearest)
            parts["distance"].append(distance)
            parts["near_duplicate"].append(distance <= each.threshold)
    return {column: np.concatenate(arrays) for column, arrays in parts.items()}


def _draw(name: str, dataset: ImageDataset, spaces: dict[Space, Distances], pairs: dict[str, npt.NDArray[Any]]) -> "Figure":
    """Draw rows of test images above training images: the nearest images in each space, then the pairs of highest influence.

    Args:
        name: of the experiment.
        dataset: its images.
        spaces: distances, those of the pairs drawn first among those of all pairs.
        pairs: columns of the pairs drawn.
    """
    from memtail.figures.style import drawing

    rows: list[tuple[str, list[tuple[int, int, str]]]] = []
    for space, each in spaces.items():
        nearest = np.argsort(each.test, kind="stable")[:_SHOWN]
        shown = [(int(each.test_nearest[j]), int(j), f"{each.test[j]:.3f}") for j in nearest]
        rows.append((f"nearest by {space}\n(threshold {each.threshold:.3f})", shown))
    top = [
        (int(pairs["tr_idx"][p]), int(pairs["tt_idx"][p]), f"{spaces['pixels'].pairs[p]:.3f}, {spaces['features'].pairs[p]:.3f}")
        for p in range(min(_SHOWN, len(pairs["tr_idx"])))
    ]
    if top:
        rows.append(("highest influence\n(pixels, features)", top))
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
        figure.suptitle(f"{name}: test images above training images, and their distances")
    return figure
