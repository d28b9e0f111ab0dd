"""Devices of the tests: the CPU, and a GPU where there is one."""

import pytest
import torch

CUDA = pytest.param(
    "cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """Each device that there is."""
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def gpu(request):
    """A GPU."""
    return torch.device(request.param)
