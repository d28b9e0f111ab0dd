"""`cooccurrence` on a device: bits as int8, multiplied by the matrix units that quantised networks run on. Needs torch.

Words stay packed on the device; only the examples of one block are unpacked at a time, and of those only a chunk of trials, so memory
follows from the block and not from n, q or t. Sums are taken in int32: the counts are exact, and equal to `cooccurrence`.
"""

import torch
from torch import Tensor

from memtail.statistics.accumulator import Words

_CHUNK = 64  # words, of 64 trials each, unpacked at a time

# What `torch._int_mm` asks of its shapes on CUDA: more than 16 rows, and all sides multiples of 8; more is faster.
_MULTIPLE = 32


def words_on(words: Words, device: str | torch.device) -> Tensor:
    """Packed words, uint64 [W, a], on a device example by example: int64 [a, W] of the same bits."""
    return torch.from_numpy(words.view("int64").copy()).to(device).T.contiguous()


def count_block(left: Tensor, right: Tensor) -> Tensor:
    """Count, for every pair of examples, the trials whose bit is set in both.

    Args:
        left, right: int64 [a, W] and [b, W] on one CPU or CUDA device, as from `words_on`.

    Returns:
        int32 [a, b], equal to `cooccurrence` of the same words.
    """
    rows, columns = len(left), len(right)
    left, right = _padded(left), _padded(right)
    total = left.new_zeros((len(left), len(right)), dtype=torch.int32)
    for start in range(0, left.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total += torch._int_mm(_bits(left[:, chunk]), _bits(right[:, chunk]).T)
    return total[:rows, :columns]


def _padded(words: Tensor) -> Tensor:
    return torch.cat([words, words.new_zeros(-len(words) % _MULTIPLE, words.shape[1])])  # `pad` refuses no trials before torch 2.7


def _bits(words: Tensor) -> Tensor:
    """int64 [a, W] -> int8 [a, 64 W] of 0 and 1."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return (octets[..., None] >> places).bitwise_and_(1).view(torch.int8).flatten(1)
