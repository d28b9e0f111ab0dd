"""Counting pairs by table lookup, for processors that have byte shuffles (AVX2) but no vector population count.

Four trials of an example are one of 16 patterns. For each pattern of the left example, a table of 16 bytes holds how many trials it shares
with each pattern of the right example; one shuffle instruction looks that up for 32 right examples at once. That is two instructions for
32 pairs and four trials, where AND and population count take ten.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_features = llvmlite.binding.get_host_cpu_features()

#: Whether the processor can, and whether it is the faster way here.
POSSIBLE = bool(_features.get("avx2"))
FASTER = POSSIBLE and not _features.get("avx512vpopcntdq")

_PATTERN_BITS = 4
_PATTERNS = 1 << _PATTERN_BITS
_GROUPS = 64 // _PATTERN_BITS  # groups of trials in a word
_ROWS = 4
_LANES = 32
_VECTORS = 3
_COLUMNS = _VECTORS * _LANES
_BLOCK = 128  # rows whose counts, and whose patterns of a part, stay in the first-level cache
_AT_ONCE = 2  # groups in one pass of the innermost loop
_MOST_GROUPS = 255 // _PATTERN_BITS // _AT_ONCE * _AT_ONCE  # that a byte can count: a part
_MOST_PARTS = 65535 // (_MOST_GROUPS * _PATTERN_BITS)  # that 16 bits can count

# At [16 a + b], the number of trials in both of two patterns.
_SHARED = np.array([[(a & b).bit_count() for b in range(_PATTERNS)] for a in range(_PATTERNS)], np.uint8).ravel()

_BYTE, _COUNT, _LANE, _INDEX = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES, _TABLE, _COUNTS = ir.VectorType(_BYTE, _LANES), ir.VectorType(_BYTE, _PATTERNS), ir.VectorType(_COUNT, _LANES)


def _shared_counts(
    typing_context: Any,
    rows: Any,
    rows_start: Any,
    rows_stride: Any,
    columns: Any,
    columns_start: Any,
    groups: Any,
    shared: Any,
    counts: Any,
    counts_start: Any,
) -> Any:
    """counts[r, c] += sum over g of shared[rows[r, g] + columns[g, c]], for _ROWS rows, _COLUMNS columns and at most _MOST_GROUPS groups, _AT_ONCE at a time.

    `rows` are uint8 offsets of tables, `columns` uint8 patterns; `counts` is uint16 [..., _COLUMNS], its rows beginning at counts_start.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(place: Any) -> Any:
            return context.make_array(signature.args[place])(context, builder, arguments[place]).data

        _, rows_start, rows_stride, _, columns_start, groups, _, _, counts_start = arguments
        rows, columns, shared, counts = data(0), data(3), data(6), data(7)
        shuffle = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_BYTES, [_BYTES, _BYTES]), "llvm.x86.avx2.pshuf.b")

        def load(array: Any, place: Any, kind: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(array, [place]), kind.as_pointer()))
            loaded.align = 1
            return loaded

        def at(number: Any) -> Any:
            return ir.Constant(_INDEX, number)

        sums = [[cgutils.alloca_once_value(builder, ir.Constant(_BYTES, [0] * _LANES)) for _ in range(_VECTORS)] for _ in range(_ROWS)]
        for row in sums:
            for kept in row:
                builder.store(ir.Constant(_BYTES, [0] * _LANES), kept)
        twice = ir.Constant(ir.VectorType(_LANE, _LANES), [*range(_PATTERNS)] * 2)
        with cgutils.for_range(builder, builder.udiv(groups, at(_AT_ONCE))) as loop:
            for ahead in range(_AT_ONCE):
                group = builder.add(builder.mul(loop.index, at(_AT_ONCE)), at(ahead))
                place = builder.add(columns_start, builder.mul(group, at(_COLUMNS)))
                patterns = [load(columns, builder.add(place, at(v * _LANES)), _BYTES) for v in range(_VECTORS)]
                for r, row in enumerate(sums):
                    where = builder.add(builder.add(rows_start, builder.mul(rows_stride, at(r))), group)
                    offset = builder.zext(builder.load(builder.gep(rows, [where])), _INDEX)
                    table = load(shared, offset, _TABLE)
                    table = builder.shuffle_vector(table, ir.Constant(_TABLE, ir.Undefined), twice)
                    for pattern, kept in zip(patterns, row, strict=True):
                        builder.store(builder.add(builder.load(kept), builder.call(shuffle, [table, pattern])), kept)
        for r, row in enumerate(sums):
            for v, kept in enumerate(row):
                pointer = builder.bitcast(
                    builder.gep(counts, [builder.add(counts_start, at(r * _COLUMNS + v * _LANES))]), _COUNTS.as_pointer()
                )
                before = builder.load(pointer)
                before.align = 2
                stored = builder.store(builder.add(before, builder.zext(builder.load(kept), _COUNTS)), pointer)
                stored.align = 2
        return context.get_dummy_value()

    del typing_context
    return types.void(rows, rows_start, rows_stride, columns, columns_start, groups, shared, counts, counts_start), generate


_add_shared: Any = intrinsic(_shared_counts)


@numba.njit(cache=True, boundscheck=False)
def _patterns(words, first, count, out):  # type: ignore[no-untyped-def]
    """out[g, c] = the g-th pattern of column first + c, for `count` columns; uint8 [groups, _COLUMNS], laid flat."""
    for w in range(len(words)):
        for g in range(_GROUPS):
            start = (w * _GROUPS + g) * _COLUMNS
            shift = np.uint64(g * _PATTERN_BITS)
            patterns, given = out[start : start + count], words[w, first : first + count]
            for c in range(count):
                patterns[c] = np.uint8((given[c] >> shift) & np.uint64(_PATTERNS - 1))


@numba.njit(cache=True, boundscheck=False)
def _offsets(words, first, count, padded, out):  # type: ignore[no-untyped-def]
    """Where the tables of `count` rows begin, in the order in which they are read: uint8 [parts, padded, _MOST_GROUPS], laid flat."""
    for i in range(count):
        for w in range(len(words)):
            for g in range(_GROUPS):
                pattern = (words[w, first + i] >> np.uint64(g * _PATTERN_BITS)) & np.uint64(_PATTERNS - 1)
                part, place = divmod(w * _GROUPS + g, _MOST_GROUPS)
                out[(part * padded + i) * _MOST_GROUPS + place] = np.uint8(pattern * np.uint64(_PATTERNS))


@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_pairs(left, right, out):  # type: ignore[no-untyped-def]
    """out[i, j] = sum_w popcount(left[w, i] & right[w, j]), for uint64 [W, a] and [W, b]."""
    words, rows = left.shape
    columns = right.shape[1]
    groups = words * _GROUPS
    parts = (groups + _MOST_GROUPS - 1) // _MOST_GROUPS
    tiles = (columns + _COLUMNS - 1) // _COLUMNS
    patterns = np.zeros((tiles, groups * _COLUMNS), np.uint8)
    for tile in numba.prange(tiles):
        _patterns(right, tile * _COLUMNS, min(_COLUMNS, columns - tile * _COLUMNS), patterns[tile])
    for block in numba.prange((rows + _BLOCK - 1) // _BLOCK):
        size = min(_BLOCK, rows - block * _BLOCK)
        padded = (size + _ROWS - 1) // _ROWS * _ROWS
        offsets = np.zeros(parts * padded * _MOST_GROUPS, np.uint8)
        _offsets(left, block * _BLOCK, size, padded, offsets)
        counts = np.empty(padded * _COLUMNS, np.uint16)
        for tile in range(tiles):
            first = tile * _COLUMNS
            count = min(_COLUMNS, columns - first)
            for begin in range(0, parts, _MOST_PARTS):
                counts[:] = 0
                for part in range(begin, min(begin + _MOST_PARTS, parts)):
                    count_now = min(_MOST_GROUPS, groups - part * _MOST_GROUPS)
                    start = part * _MOST_GROUPS * _COLUMNS
                    for i in range(0, padded, _ROWS):
                        row = (part * padded + i) * _MOST_GROUPS
                        _add_shared(offsets, row, _MOST_GROUPS, patterns[tile], start, count_now, _SHARED, counts, i * _COLUMNS)
                for i in range(size):
                    counted, wanted = counts[i * _COLUMNS : (i + 1) * _COLUMNS], out[block * _BLOCK + i, first : first + count]
                    if begin:
                        for c in range(count):
                            wanted[c] += np.int32(counted[c])
                    else:
                        for c in range(count):
                            wanted[c] = counted[c]
