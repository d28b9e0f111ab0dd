"""Augmentations: values and distributions of torchvision, and equal bits in any shard."""

import numpy as np
import pytest
import torch

from memtail.datasets import prepare
from memtail.spec import ColorJitter, CropFlip, RandomErasing, RandomResizedCrop
from memtail.trainers.images import train_shard
from memtail.trainers.images.augmentations import augment, epoch_augmentation
from memtail.trainers.images.batches import draw_epoch
from memtail.trainers.images.images import DeviceImages
from tests.support.training import same_bits

CPU = torch.device("cpu")
CROP = RandomResizedCrop(name="random-resized-crop")
JITTER = ColorJitter(name="color-jitter", brightness=0.4, contrast=0.5, saturation=0.6, hue=0.1)
ERASING = RandomErasing(name="random-erasing")


def augmented(step, images, epoch=0):
    """Return the draws and the augmented images [N, H, W, C] of one step, for one trial."""
    count, height, width, channels = images.shape
    augmentation = epoch_augmentation([step], 5, [7], epoch, count, (height, width))
    draws = [{name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in augmentation.draws]
    result = augment(images[None], augmentation.names, draws, torch.arange(channels) * 10.4 + 100)
    assert result.dtype == torch.uint8
    return {name: array[0] for name, array in augmentation.draws[0].items()}, result[0]


def pictures(channels, count=40, height=24, width=20):
    """Return smooth images with noise: uint8 [N, H, W, C]."""
    rng = np.random.default_rng(channels)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, channels, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    return (smooth + torch.from_numpy(rng.normal(0, 15, smooth.shape))).clamp(0, 255).to(torch.uint8)


def apart(ours, theirs):
    """Return the largest difference of pixels: ours is [H, W, C], theirs [C, H, W]."""
    return (ours.permute(2, 0, 1).double() - theirs.double()).abs().max()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_resized_crop_has_the_pixels_of_torchvision(channels):
    from torchvision.transforms.v2 import functional as tv

    images = pictures(channels)
    drawn, cropped = augmented(CROP, images)
    for image, result, *place in zip(
        images.permute(0, 3, 1, 2), cropped, *(drawn[key] for key in ("top", "left", "height", "width")), strict=True
    ):
        top, left, height, width = map(int, place)
        exact = tv.resized_crop(image.double(), top, left, height, width, image.shape[1:], antialias=True)
        assert apart(result, exact) < 0.501
        assert apart(result, tv.resized_crop(image, top, left, height, width, image.shape[1:], antialias=True)) <= 1


def theirs_of(place, image, factor):
    """Return an image with brightness, contrast, saturation or hue changed by torchvision."""
    from torchvision.transforms.v2 import functional as tv

    return (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[place](image, float(factor))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_change_of_colour_has_the_pixels_of_torchvision(channels, name):
    images = pictures(channels)
    drawn, changed = augmented(ColorJitter(name="color-jitter", **{name: 0.4}), images)
    place = list(ColorJitter.model_fields).index(name) - 1
    assert (drawn["order"] == place).all()
    for image, result, factors in zip(images.permute(0, 3, 1, 2), changed, drawn["factors"], strict=True):
        assert apart(result, theirs_of(place, image, factors[place])) <= 1
    same = (changed == images).all()
    assert same == (channels == 1 and name in ("saturation", "hue"))


def test_changes_of_colour_follow_one_another_as_drawn():
    images = pictures(3)
    drawn, changed = augmented(JITTER, images)
    differences = []
    for image, result, factors, order in zip(images.permute(0, 3, 1, 2), changed, drawn["factors"], drawn["order"], strict=True):
        assert sorted(order) == [0, 1, 2, 3]
        for change in order:
            image = theirs_of(change, image, factors[change])  # noqa: PLW2901
        differences.append(result.permute(2, 0, 1).double() - image.double())
    apart_by = torch.stack(differences).abs()
    assert apart_by.max() <= 4  # one for each change
    assert apart_by.mean() < 0.4


def test_erased_rectangles_hold_the_mean_pixel():
    from torchvision.transforms.v2 import functional as tv

    images = pictures(3, count=200)
    drawn, erased = augmented(ERASING, images)
    for image, result, *place in zip(
        images.permute(0, 3, 1, 2), erased, *(drawn[key] for key in ("top", "left", "height", "width")), strict=True
    ):
        expected = tv.erase(image, *map(int, place), torch.tensor([100, 110, 121], dtype=torch.uint8)[:, None, None])
        assert apart(result, expected) == 0
    assert 60 < (drawn["height"] > 0).sum() < 140


@pytest.mark.parametrize(
    ("step", "theirs", "keys"),
    [
        (CROP, ("RandomResizedCrop", {"size": (24, 20)}), ("top", "left", "height", "width")),
        (
            RandomResizedCrop(name="random-resized-crop", ratio=[2, 3]),
            ("RandomResizedCrop", {"size": (24, 20), "ratio": (2, 3)}),
            ("top", "left", "height", "width"),
        ),
        (RandomErasing(name="random-erasing", probability=1.0), ("RandomErasing", {"p": 1.0}), ("i", "j", "h", "w")),
    ],
)
def test_rectangles_are_distributed_as_those_of_torchvision(step, theirs, keys):
    from scipy import stats
    from torchvision.transforms import v2

    torch.manual_seed(0)
    image = torch.zeros(3, 24, 20)
    drawn = epoch_augmentation([step], 0, [0], 0, 4000, (24, 20)).draws[0]
    transform = getattr(v2, theirs[0])(**theirs[1])
    params = [transform.make_params([image]) for _ in range(4000)]
    for ours, key in zip(("top", "left", "height", "width"), keys, strict=True):
        assert stats.ks_2samp(drawn[ours][0], [each[key] for each in params]).pvalue > 0.001, ours


def test_a_crop_that_never_fits_is_the_largest_one_at_the_centre():
    from torchvision.transforms import v2

    step = RandomResizedCrop(name="random-resized-crop", scale=[1.0, 1.0], ratio=[3.0, 4.0])
    drawn = epoch_augmentation([step], 0, [0], 0, 5, (24, 20)).draws[0]
    expected = v2.RandomResizedCrop((24, 20), scale=(1.0, 1.0), ratio=(3.0, 4.0)).make_params([torch.zeros(3, 24, 20)])
    assert {key: set(values[0].tolist()) for key, values in drawn.items()} == {key: {value} for key, value in expected.items()}


def test_changes_of_colour_are_distributed_as_those_of_torchvision():
    from scipy import stats
    from torchvision.transforms import v2

    torch.manual_seed(0)
    drawn = epoch_augmentation([JITTER], 0, [0], 0, 4000, (24, 20)).draws[0]
    theirs = v2.ColorJitter(0.4, 0.5, 0.6, 0.1)
    params = [theirs.make_params([]) for _ in range(4000)]
    for place, key in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        assert stats.ks_2samp(drawn["factors"][0, :, place], [each[key] for each in params]).pvalue > 0.001, key
    counts = np.unique(drawn["order"][0], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


def test_augmentation_shifts_with_zeros_and_mirrors(digits):
    images = DeviceImages(digits, CPU)
    index = torch.arange(20).reshape(2, 10)
    drawn = draw_epoch([CropFlip(name="crop-flip")], 0, [3, 4], 0, index.numpy(), (8, 8), lambda tensor: tensor)
    moves, index = {name: values.numpy() for name, values in drawn.draws[0].items()}, drawn.order
    pixels, labels = next(images.batches(drawn, [slice(0, 10)]))
    assert (labels == torch.from_numpy(digits.train_labels)[index]).all()
    normalised = images.normalised(pixels)
    got = normalised * torch.tensor(digits.std) + torch.tensor(digits.mean)
    assert len(set(moves["down"].flatten().tolist())) == 3
    assert 0 < moves["flip"].mean() < 1
    for s in range(2):
        for b in range(10):
            padded = np.pad(digits.train_images[int(index[s, b]), ..., 0], 1)
            down, right = moves["down"][s, b], moves["right"][s, b]
            expected = padded[1 - down : 9 - down, 1 - right : 9 - right]
            # the image is mirrored first, then shifted: mirror the source, then take the same window
            if moves["flip"][s, b]:
                mirrored = np.pad(digits.train_images[int(index[s, b]), :, ::-1, 0], 1)
                expected = mirrored[1 - down : 9 - down, 1 + right : 9 + right]
            np.testing.assert_allclose(got[s, b, 0].numpy(), expected, atol=1e-3)


CHAIN = [CROP.model_dump(), "flip", JITTER.model_dump(), ERASING.model_dump()]


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "resnet9", "options": {"width": 2}}])
def test_a_chain_gives_the_same_bits_in_any_shard(declare, tmp_path, model):
    images = pictures(3, count=60, height=16, width=16).numpy()
    labels = np.arange(60) % 2
    np.savez(tmp_path / "a.npz", train_images=images[:50], train_labels=labels[:50], test_images=images[50:], test_labels=labels[50:])
    experiment = declare(
        5,
        dataset={"name": "arrays", "root": str(tmp_path / "a.npz")},
        model=model,
        training={"batch_size": 16, "augmentation": CHAIN, "epochs": 2},
        record={"margins": True, "scores": True},
    )
    dataset = prepare(experiment.dataset)
    together = [train_shard(experiment, dataset, range(5), CPU)]
    assert same_bits(together, [train_shard(experiment, dataset, [trial], CPU) for trial in range(5)], recorded=True)
    assert same_bits(
        together, [train_shard(experiment, dataset, range(3), CPU), train_shard(experiment, dataset, range(3, 5), CPU)], recorded=True
    )


def test_the_steps_of_a_chain_are_applied_in_their_order():
    images = pictures(3)[None]
    augmentation = epoch_augmentation([CROP, CropFlip(name="crop-flip"), JITTER], 0, [0], 0, 40, (24, 20))
    draws = [{name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in augmentation.draws]
    expected = images
    for name, drawn in zip(augmentation.names, draws, strict=True):
        expected = augment(expected, [name], [drawn], torch.zeros(3))
    assert augmentation.names == ("random-resized-crop", "crop-flip", "color-jitter")
    assert torch.equal(augment(images, augmentation.names, draws, torch.zeros(3)), expected)
