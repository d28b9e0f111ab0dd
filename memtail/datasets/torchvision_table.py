"""torchvision's classification datasets: how each is split, and the files it reads below its root.

A further one is an entry here, and its name in `memtail.spec.TorchvisionDataset`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A class of `torchvision.datasets`.

    Attributes:
        train: arguments of its constructor for the training split.
        test: likewise, for the test split; None if it has no test images of the classes that are trained.
        files: patterns of its files below the root; all must match where it is.
        listed: whether it passes the path of each image to `loader`. Of others, all files are in `files`.
        by_hand: what to put where, if torchvision cannot download it.
        unordered: whether the order of its listed files is that of the file system, so that they must be sorted.
        mixed: whether it gives some images in grey, and others in colour.
    """

    train: dict[str, Any]
    test: dict[str, Any] | None
    files: tuple[str, ...] = ()
    listed: bool = False
    by_hand: str | None = None
    unordered: bool = False
    mixed: bool = False


def _by_train(*files: str) -> Entry:
    return Entry({"train": True}, {"train": False}, files)


def _by_split(*files: str, train: str = "train", test: str = "test", listed: bool = False, by_hand: str | None = None) -> Entry:
    return Entry({"split": train}, {"split": test}, files, listed, by_hand)


ENTRIES: dict[str, Entry] = {
    "CIFAR10": _by_train("cifar-10-batches-py/*"),
    "CIFAR100": _by_train("cifar-100-python/*"),
    "CLEVRClassification": _by_split("clevr/*", test="val", listed=True),
    "Caltech101": Entry({}, None, ("caltech101/101_ObjectCategories/*/*.jpg",), mixed=True),
    "Caltech256": Entry({}, None, ("caltech256/256_ObjectCategories/*/*.jpg",), mixed=True),
    "Country211": _by_split("country211/*", listed=True),
    "DTD": _by_split("dtd/*", listed=True),
    "EMNIST": _by_train("EMNIST/raw/*"),
    "EuroSAT": Entry({}, None, ("eurosat/2750",), listed=True),
    "FER2013": _by_split("fer2013/*.csv", by_hand="fer2013/fer2013.csv of Kaggle's challenge in facial expression recognition"),
    "FGVCAircraft": _by_split("fgvc-aircraft-2013b/*", train="trainval", listed=True),
    # images follow from the sum of their index and an offset
    "FakeData": Entry({}, {"random_offset": 1_000_000}),
    "FashionMNIST": _by_train("FashionMNIST/raw/*"),
    "Flowers102": _by_split("flowers-102/*", listed=True),
    "Food101": _by_split("food-101/*", listed=True),
    "GTSRB": _by_split("gtsrb/GT-final_test.csv", "gtsrb/GTSRB/Training/**/*.ppm", "gtsrb/GTSRB/Final_Test/Images/*.ppm"),
    "INaturalist": Entry({"version": "2021_train"}, {"version": "2021_valid"}, ("2021_train*", "2021_valid"), listed=True, unordered=True),
    "ImageNet": _by_split(
        "*val*",  # the archive, or the folder that torchvision makes of it
        test="val",
        listed=True,
        by_hand="ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org",
    ),
    "Imagenette": _by_split("imagenette2*", test="val", listed=True),
    "KMNIST": _by_train("KMNIST/raw/*"),
    # its splits train and test hold different people
    "LFWPeople": Entry(
        {"split": "10fold"},
        None,
        ("lfw-py/*",),
        listed=True,
        by_hand="lfw-py with lfw-funneled.tgz, lfw_funneled, people.txt and lfw-names.txt",
    ),
    "MNIST": _by_train("MNIST/raw/*"),
    "OxfordIIITPet": _by_split("oxford-iiit-pet/annotations/*.txt", "oxford-iiit-pet/images/*.jpg", train="trainval"),
    "PCAM": _by_split("pcam/*_train_?.h5", "pcam/*_test_?.h5"),
    "Places365": _by_split("categories_places365.txt", train="train-standard", test="val", listed=True),
    "QMNIST": _by_train("QMNIST/raw/*"),
    "RenderedSST2": _by_split("rendered-sst2/*", listed=True),
    "SEMEION": Entry({}, None, ("semeion.data",)),
    "STL10": _by_split("stl10_binary/*"),
    "SUN397": Entry({}, None, ("SUN397/ClassName.txt",), listed=True, unordered=True),
    "SVHN": _by_split("train_32x32.mat", "test_32x32.mat"),
    "StanfordCars": _by_split(
        "stanford_cars/devkit", listed=True, by_hand="stanford_cars with devkit, cars_train, cars_test and cars_test_annos_withlabels.mat"
    ),
    "USPS": _by_train("usps.bz2", "usps.t.bz2"),
}
