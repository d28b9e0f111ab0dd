"""Small datasets in the file formats of torchvision's classes: `WRITERS[name](root)` writes one.

Images of both splits have one size. torchvision verifies MD5 sums of some files, which no small file has: `accept_any_bytes` leaves out
that check, and nothing else.
"""

import bz2
import csv
import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TRAIN, TEST = 6, 4


def accept_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision find files intact that exist, whatever their bytes."""
    from torchvision import datasets

    for name in dir(datasets):
        module = sys.modules.get(getattr(getattr(datasets, name), "__module__", ""))
        if module is not None and hasattr(module, "check_integrity"):
            monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _image(path: Path, seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(12, 10, 3, seed=seed)).convert(mode).save(path)


def _idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def _labels(count: int, classes: int = 2) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


def _mnist(folder: str, names: tuple[str, str]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for seed, (name, count) in enumerate(zip(names, (TRAIN, TEST), strict=True)):
            _idx(root / folder / "raw" / f"{name}-images-idx3-ubyte", _pixels(count, 28, 28, seed=seed))
            _idx(root / folder / "raw" / f"{name}-labels-idx1-ubyte", _labels(count))

    return write


def _qmnist(root: Path) -> None:
    for name, count in (("train", TRAIN), ("test", TEST)):
        _idx(root / "QMNIST/raw" / f"qmnist-{name}-images-idx3-ubyte", _pixels(count, 28, 28, seed=count))
        labels = np.zeros((count, 8), np.int32)
        labels[:, 0] = _labels(count)
        _idx(root / "QMNIST/raw" / f"qmnist-{name}-labels-idx2-int", labels, kind=12)


def _usps(root: Path) -> None:
    for name, count in (("usps.bz2", TRAIN), ("usps.t.bz2", TEST)):
        values = np.random.default_rng(count).uniform(-1, 1, (count, 256))
        rows = [
            f"{label + 1} " + " ".join(f"{place}:{value:.4f}" for place, value in enumerate(row, 1))
            for label, row in zip(_labels(count), values, strict=True)
        ]
        (root / name).write_bytes(bz2.compress(("\n".join(rows) + "\n").encode()))


def _svhn(root: Path) -> None:
    from scipy.io import savemat

    for name, count in (("train", TRAIN), ("test", TEST)):
        labels = np.where(_labels(count) == 0, 10, 1)[:, None].astype(np.uint8)  # 10 is the digit 0
        savemat(root / f"{name}_32x32.mat", {"X": _pixels(32, 32, 3, count, seed=count), "y": labels})


def _stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", TRAIN), ("test", TEST)):
        _pixels(count, 3, 96, 96, seed=count).tofile(folder / f"{name}_X.bin")
        (_labels(count) + 1).tofile(folder / f"{name}_y.bin")
    _pixels(1, 3, 96, 96).tofile(folder / "unlabeled_X.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")


def _cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, count in (*((f"data_batch_{number}", 2) for number in range(1, 6)), ("test_batch", TEST)):
        content = {"data": _pixels(count, 3072, seed=sum(name.encode())), "labels": _labels(count).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))


def _fer2013(root: Path) -> None:
    (root / "fer2013").mkdir()
    with (root / "fer2013/fer2013.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        for index in range(TRAIN + TEST):
            pixels = " ".join(map(str, _pixels(48 * 48, seed=index).tolist()))
            rows.writerow([index % 2, pixels, "Training" if index < TRAIN else "PublicTest"])


def _gtsrb(root: Path) -> None:
    folder = root / "gtsrb/GTSRB"
    for index in range(TRAIN):
        _image(folder / f"Training/{index % 2:05}/{index:05}.ppm", index)
    rows = ["Filename;Width;ClassId"]
    for index in range(TEST):
        _image(folder / f"Final_Test/Images/{index:05}.ppm", TRAIN + index)
        rows.append(f"{index:05}.ppm;10;{index % 2}")
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(rows))


def _pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for name, begin, count in (("trainval", 0, TRAIN), ("test", TRAIN, TEST)):
        rows = []
        for index in range(begin, begin + count):
            breed = ("Abyssinian", "american_bulldog")[index % 2]
            _image(folder / f"images/{breed}_{index}.jpg", index)
            rows.append(f"{breed}_{index} {index % 2 + 1} {index % 2 + 1} 1")
        (folder / f"annotations/{name}.txt").write_text("\n".join(rows))


def _flowers(root: Path) -> None:
    from scipy.io import savemat

    folder, order = root / "flowers-102", np.random.default_rng(0).permutation(TRAIN + TEST) + 1
    for index in range(TRAIN + TEST):
        _image(folder / f"jpg/image_{index + 1:05}.jpg", index)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(TRAIN + TEST)[None] % 2 + 1})
    savemat(folder / "setid.mat", {"trnid": order[None, :TRAIN], "valid": order[None, :2], "tstid": order[None, TRAIN:]})


def _food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for name, begin, count in (("train", 0, TRAIN), ("test", TRAIN, TEST)):
        listed = {
            kind: [f"{kind}/{index}" for index in range(begin, begin + count) if index % 2 == kind_]
            for kind_, kind in enumerate(("cake", "soup"))
        }
        for index, path in enumerate(path for paths in listed.values() for path in paths):
            _image(folder / f"images/{path}.jpg", begin + index)
        (folder / f"meta/{name}.json").write_text(json.dumps(dict(reversed(listed.items()))))


def _dtd(root: Path) -> None:
    folder = root / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for name, begin, count in (("train1", 0, TRAIN), ("test1", TRAIN, TEST)):
        paths = [f"{('banded', 'dotted')[index % 2]}/{index}.jpg" for index in range(begin, begin + count)]
        for index, path in enumerate(paths):
            _image(folder / "images" / path, begin + index)
        (folder / f"labels/{name}.txt").write_text("\n".join(paths))


def _aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nA380\n")
    for name, begin, count in (("trainval", 0, TRAIN), ("test", TRAIN, TEST)):
        for index in range(begin, begin + count):
            _image(folder / f"images/{index:07}.jpg", index)
        rows = [f"{index:07} {('707-320', 'A380')[index % 2]}" for index in range(begin, begin + count)]
        (folder / f"images_variant_{name}.txt").write_text("\n".join(rows))


def _cars(root: Path) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["AM General", "Acura"], object)})
    for name, path, count in (("train", "devkit/cars_train_annos.mat", TRAIN), ("test", "cars_test_annos_withlabels.mat", TEST)):
        rows = np.zeros(count, [("fname", object), ("class", object)])
        for index in range(count):
            _image(folder / f"cars_{name}/{index:05}.jpg", index + count)
            rows[index] = (f"{index:05}.jpg", index % 2 + 1)
        savemat(folder / path, {"annotations": rows})


def _classes(*folders: str, classes: tuple[str, ...] = ("negative", "positive"), suffix: str = ".png") -> Callable[[Path], None]:
    """Return a writer of folders that hold a folder for each class."""

    def write(root: Path) -> None:
        for folder, begin, count in zip(folders, (0, TRAIN), (TRAIN, TEST), strict=False):
            for index in range(begin, begin + count):
                _image(root / folder / classes[index % 2] / f"{index}{suffix}", index)

    return write


def _imagenet(root: Path) -> None:
    import torch

    _classes("train", "val", classes=("n01440764", "n01443537"), suffix=".JPEG")(root)
    torch.save(({"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}, []), root / "meta.bin")


def _places(root: Path) -> None:
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    for name, folder, begin, count in (("train_standard", "data_large_standard", 0, TRAIN), ("val", "val_large", TRAIN, TEST)):
        for index in range(begin, begin + count):
            _image(root / folder / f"{index}.jpg", index)
        rows = [f"/{index}.jpg {index % 2}" for index in range(begin, begin + count)]
        (root / f"places365_{name}.txt").write_text("\n".join(rows))


def _clevr(root: Path) -> None:
    folder = root / "clevr/CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for name, begin, count in (("train", 0, TRAIN), ("val", TRAIN, TEST)):
        scenes = []
        for index in range(begin, begin + count):
            _image(folder / f"images/{name}/CLEVR_{index}.png", index)
            scenes.append({"image_filename": f"CLEVR_{index}.png", "objects": [{}] * (index % 2)})
        (folder / f"scenes/CLEVR_{name}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def _caltech101(root: Path) -> None:
    for name in ("BACKGROUND_Google", "ant", "bee"):
        for number in range(1, TRAIN // 2 + 1):
            path = root / f"caltech101/101_ObjectCategories/{name}/image_{number:04}.jpg"
            _image(path, number + len(name) * ord(name[0]), "L" if number == 1 else "RGB")


def _caltech256(root: Path) -> None:
    for kind, name in enumerate(("001.ak47", "002.flag"), 1):
        for number in range(1, TRAIN // 2 + 1):
            _image(root / f"caltech256/256_ObjectCategories/{name}/{kind:03}_{number:04}.jpg", number + 10 * kind)


def _semeion(root: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, (TRAIN, 256))
    np.savetxt(root / "semeion.data", np.concatenate([values, np.eye(10)[np.arange(TRAIN) % 2]], axis=1), fmt="%.1f")


def _sun(root: Path) -> None:
    for index in range(TRAIN):
        _image(root / "SUN397" / ("a/abbey", "b/bar/outdoor")[index % 2] / f"sun_{index}.jpg", index)
    (root / "SUN397/ClassName.txt").write_text("/a/abbey\n/b/bar/outdoor\n")


def _lfw(root: Path) -> None:
    people = [("Ann_Lee", TRAIN // 2), ("Bo_Ek", TRAIN // 2)]
    for name, count in people:
        for number in range(1, count + 1):
            _image(root / f"lfw-py/lfw_funneled/{name}/{name}_{number:04}.jpg", number + len(name) * 10)
    folds = [f"1\n{name}\t{count}" for name, count in people]
    (root / "lfw-py/people.txt").write_text("\n".join(["2", *folds]) + "\n")
    (root / "lfw-py/lfw-names.txt").write_text("".join(f"{name}\t{count}\n" for name, count in people))
    (root / "lfw-py/lfw-funneled.tgz").write_bytes(b"")


#: A function that writes the files of a class below its root.
WRITERS: dict[str, Callable[[Path], None]] = {
    "CIFAR10": _cifar10,
    "CLEVRClassification": _clevr,
    "Caltech101": _caltech101,
    "Caltech256": _caltech256,
    "Country211": _classes("country211/train", "country211/test", classes=("AD", "AE"), suffix=".jpg"),
    "DTD": _dtd,
    "EMNIST": _mnist("EMNIST", ("emnist-digits-train", "emnist-digits-test")),
    "EuroSAT": _classes("eurosat/2750", classes=("Forest", "River"), suffix=".jpg"),
    "FER2013": _fer2013,
    "FGVCAircraft": _aircraft,
    "FakeData": lambda root: None,
    "FashionMNIST": _mnist("FashionMNIST", ("train", "t10k")),
    "Flowers102": _flowers,
    "Food101": _food,
    "GTSRB": _gtsrb,
    "INaturalist": _classes(
        "2021_train",
        "2021_valid",
        classes=("00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_f"),
        suffix=".jpg",
    ),
    "ImageNet": _imagenet,
    "Imagenette": _classes("imagenette2/train", "imagenette2/val", classes=("n01440764", "n02102040"), suffix=".JPEG"),
    "KMNIST": _mnist("KMNIST", ("train", "t10k")),
    "LFWPeople": _lfw,
    "MNIST": _mnist("MNIST", ("train", "t10k")),
    "OxfordIIITPet": _pets,
    "Places365": _places,
    "QMNIST": _qmnist,
    "RenderedSST2": _classes("rendered-sst2/train", "rendered-sst2/test"),
    "SEMEION": _semeion,
    "STL10": _stl10,
    "SUN397": _sun,
    "SVHN": _svhn,
    "StanfordCars": _cars,
    "USPS": _usps,
}
#: Options of classes that need some.
OPTIONS: dict[str, dict[str, Any]] = {"EMNIST": {"split": "digits"}, "FakeData": {"size": TRAIN, "image_size": [3, 8, 8], "num_classes": 2}}
