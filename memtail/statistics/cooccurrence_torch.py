"""Counts co-occurrences on a device, as int8 matrix products on the matrix units that quantised networks use. Needs torch.

Words stay packed on the device. Only a chunk of trials of the examples in one block is unpacked at a time, so memory depends on the block
and not on n, q or t. Sums are int32, so the counts are exact and equal those of `cooccurrence`.
"""

import torch
from torch import Tensor

from memtail.statistics.accumulator import Words

_CHUNK = 64  # words, of 64 trials each, unpacked at a time

# On CUDA `torch._int_mm` needs more than 16 rows and sides that are multiples of 8; a larger multiple is faster.
_MULTIPLE = 32


def words_on(words: Words, device: str | torch.device) -> Tensor:
    """Copy packed words, uint64 [W, a], to a device by example: int64 [a, W] with equal bits."""
    return torch.from_numpy(words.view("int64").copy()).to(device).T.contiguous()


def count_block(left: Tensor, right: Tensor) -> Tensor:
    """Count, for every pair of examples, the trials whose bit is set in both.

    Args:
        left: int64 [a, W] on a CPU or CUDA device, from `words_on`.
        right: int64 [b, W] on the same device.

    Returns:
        int32 [a, b], equal to `cooccurrence` of these words.
    """
    rows, columns = len(left), len(right)
    if not rows or not columns:  # which `torch._int_mm` refuses on CUDA
        return left.new_zeros((rows, columns), dtype=torch.int32)
    left, right = _padded(left), _padded(right)
    total = left.new_zeros((len(left), len(right)), dtype=torch.int32)
    for start in range(0, left.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total += torch._int_mm(_bits(left[:, chunk]), _bits(right[:, chunk]).T)
    return total[:rows, :columns]


def _padded(words: Tensor) -> Tensor:
    return torch.cat([words, words.new_zeros(-len(words) % _MULTIPLE, words.shape[1])])  # `pad` refuses no trials before torch 2.7


def _bits(words: Tensor) -> Tensor:
    """Unpack int64 [a, W] into int8 [a, 64 W] of 0 and 1."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return (octets[..., None] >> places).bitwise_and_(1).view(torch.int8).flatten(1)
