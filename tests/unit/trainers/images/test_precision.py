"""Precision of products: that of a network on a device, torch's settings, and logits of networks in bfloat16."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from memtail.models import build_model
from memtail.spec import Cnn, Mlp, NamedModel
from memtail.trainers.images import stack_trainer, train_shard
from memtail.trainers.images.devices import float32_products, reproducible
from memtail.trainers.images.precision import computed_precision, exact_last_layer
from memtail.trainers.images.stack import stack_networks
from tests.support.training import same_bits

BACKENDS: Any = torch.backends  # stubs lack the newer switches
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NETWORKS = {
    "mlp": lambda: build_model(Mlp(hidden=[16]), (1, 8, 8), 10),
    "cnn": lambda: build_model(Cnn(channels=[4], hidden=8), (1, 8, 8), 10),
    "resnet9": lambda: build_model(NamedModel(name="resnet9", options={"width": 4}), (1, 8, 8), 10),
}


@pytest.mark.parametrize(("declared", "device", "expected"), [
    ("float32", CUDA, ["float32"] * 3), ("tf32", CUDA, ["tf32"] * 3), ("bfloat16", CUDA, ["bfloat16"] * 3),
    ("auto", CUDA, ["tf32", "bfloat16", "bfloat16"]),
    ("float32", CPU, ["float32"] * 3), ("tf32", CPU, ["float32"] * 3), ("bfloat16", CPU, ["bfloat16"] * 3), ("auto", CPU, ["float32"] * 3),
])  # fmt: skip
def test_the_precision_follows_from_the_declared_one_the_network_and_the_device(declared, device, expected):
    assert [computed_precision(declared, make(), device) for make in NETWORKS.values()] == expected


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "resnet9", "options": {"width": 2}}])
@pytest.mark.parametrize("precision", ["tf32", "auto"])
def test_tf32_changes_no_bit_on_a_cpu(declare, digits, model, precision):
    plain, declared = (declare(2, model=model, training={"epochs": 1, "precision": each}) for each in ("float32", precision))
    assert plain.fingerprint("x") != declared.fingerprint("x")
    assert same_bits([train_shard(plain, digits, range(2), CPU)], [train_shard(declared, digits, range(2), CPU)])


def tf32():
    """Return what decides on TF32 in products and in convolutions."""
    return BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32


def settings():
    return [holder.fp32_precision for holder in (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)]


@pytest.fixture
def restored():
    """Restore torch's settings after a test that changes them."""
    yield
    BACKENDS.fp32_precision = "none"
    BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32 = False, True


def by_the_old_switches():
    BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32 = True, True


def for_all_operators():
    BACKENDS.fp32_precision = "tf32"


def by_contradicting_switches():
    """As when a user sets the new switch of one operator; torch then refuses to read the old ones."""
    BACKENDS.cudnn.conv.fp32_precision = "ieee"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        assert BACKENDS.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="torch before 2.9 has one set of switches")
@pytest.mark.parametrize("user_sets", [lambda: None, by_the_old_switches, for_all_operators, by_contradicting_switches])
def test_both_switches_are_set_and_restored_whatever_the_user_has_set(restored, user_sets):
    user_sets()
    before = settings()
    with reproducible(CPU):
        assert (settings(), tf32()) == (["ieee"] * 3, (False, False))
        with float32_products(tf32=True):
            assert (settings(), tf32()) == (["tf32"] * 3, (True, True))
        assert (settings(), tf32()) == (["ieee"] * 3, (False, False))
    assert settings() == before
    if user_sets is not by_contradicting_switches:
        user_sets()  # without an effect
        assert settings() == before


def test_a_run_trains_and_evaluates_in_its_precision_and_restores_the_settings_when_it_stops(declare, digits, monkeypatch):
    monkeypatch.setattr(stack_trainer, "computed_precision", lambda *_: "tf32")
    seen = []
    with pytest.raises(ZeroDivisionError):
        train_shard(declare(2), digits, range(1), CPU, on_progress=lambda _: seen.append(tf32()) or 1 / 0)
    assert seen == [(True, True)]
    assert tf32() == (False, True)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_logits_of_a_network_in_bfloat16_are_not_rounded_to_bfloat16(make):
    """Rounded ones tie: an H200 found 0.04% equal largest logits, and none with a last layer in float32."""
    torch.manual_seed(0)
    stack = stack_networks([make()]).eval()
    images = torch.randn(200, 1, 8, 8)
    logits = {}
    for name, exact in (("rounded", contextlib.nullcontext()), ("exact", exact_last_layer(stack)), ("after", contextlib.nullcontext())):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), exact:
            logits[name] = stack(images)[0]
    assert logits["exact"].dtype == torch.float32
    assert (logits["exact"] != logits["exact"].bfloat16().float()).float().mean() > 0.9
    torch.testing.assert_close(logits["exact"], logits["rounded"].float(), atol=0.05, rtol=0.05)
    assert torch.equal(logits["after"], logits["rounded"])
    truth = stack(images)[0]
    errors = [(logits[name].float() - truth).abs().mean() for name in ("exact", "rounded")]
    assert errors[0] < errors[1]


def test_a_network_without_a_linear_layer_keeps_its_logits():
    network = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    stack = stack_networks([network])
    with exact_last_layer(stack):
        assert stack(torch.zeros(2, 1, 8, 8)).shape == (1, 2, 10)
