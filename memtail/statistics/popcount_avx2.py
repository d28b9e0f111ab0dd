"""Counts co-occurrences by table look-up, for processors with byte shuffles (AVX2) but without a vector population count.

Four trials of an example form one of 16 patterns. For a pattern of a left example, a table of 16 bytes holds the number of trials that it
shares with each pattern of a right example; one shuffle instruction looks up 32 right examples at once. Each table serves two left
examples, with the count of one in the lower half of a byte and that of the other in the upper half. Half a byte holds the counts of three
groups of trials, so 64 pairs and twelve trials take ten instructions, where AND and population count take ten for 32 pairs and four trials.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from memtail.statistics.numba_lock import with_numba_lock

_features = llvmlite.binding.get_host_cpu_features()

#: Whether the processor has byte shuffles, and whether look-ups are faster on it than population counts.
POSSIBLE = bool(_features.get("avx2"))
FASTER = POSSIBLE and not _features.get("avx512vpopcntdq")

_PATTERN_BITS = 4
_PATTERNS = 1 << _PATTERN_BITS
_GROUPS = 64 // _PATTERN_BITS  # groups of trials per word
_ROWS = 2  # left examples per table
_LANES = 32
_VECTORS = 4
_COLUMNS = _VECTORS * _LANES
_BLOCK = 64  # rows in one task: their counts, and their patterns of a part, stay in the first-level cache
_AT_ONCE = 15 // _PATTERN_BITS  # groups that half a byte counts without overflow
_MOST_GROUPS = 255 // _PATTERN_BITS // _AT_ONCE * _AT_ONCE  # groups that a byte counts without overflow: a part
_MOST_PARTS = 65535 // (_MOST_GROUPS * _PATTERN_BITS)  # parts that 16 bits count without overflow

# The table of the left patterns a and b begins at 16 (a + 16 b); its entry c is |a & c| + 16 |b & c|, the numbers of shared trials.
_SHARED = np.array(
    [[(a & c).bit_count() + 16 * (b & c).bit_count() for c in range(_PATTERNS)] for b in range(_PATTERNS) for a in range(_PATTERNS)],
    np.uint8,
).ravel()

_BYTE, _COUNT, _LANE, _INDEX = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES, _TABLE = ir.VectorType(_BYTE, _LANES), ir.VectorType(_BYTE, _PATTERNS)
_PAIRS, _COUNTS = ir.VectorType(_COUNT, _LANES // 2), ir.VectorType(_COUNT, _LANES)


def _shared_counts(
    typing_context: Any,
    tables: Any,
    tables_start: Any,
    columns: Any,
    columns_start: Any,
    groups: Any,
    shared: Any,
    counts: Any,
    counts_start: Any,
) -> Any:
    """Add the trials that _ROWS rows and _COLUMNS columns share in some groups of trials to their counts; a numba intrinsic.

    All arrays are flat; a `_start` is the index of an array's first element to use. `tables`: uint8 [groups], each group's patterns of both
    rows. `columns`: uint8 [groups, _COLUMNS], patterns. `groups`: their number, a multiple of _AT_ONCE, at most _MOST_GROUPS. `shared`:
    _SHARED. `counts`: uint16 [_ROWS, _COLUMNS].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(place: Any) -> Any:
            return context.make_array(signature.args[place])(context, builder, arguments[place]).data

        _, tables_start, _, columns_start, groups, _, _, counts_start = arguments
        tables, columns, shared, counts = data(0), data(2), data(5), data(6)
        shuffle = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_BYTES, [_BYTES, _BYTES]), "llvm.x86.avx2.pshuf.b")

        def load(array: Any, place: Any, kind: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(array, [place]), kind.as_pointer()))
            loaded.align = 1
            return loaded

        def at(number: Any) -> Any:
            return ir.Constant(_INDEX, number)

        zero, lower = ir.Constant(_BYTES, [0] * _LANES), ir.Constant(_BYTES, [15] * _LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(_VECTORS)] for _ in range(_ROWS)]
        for total in (total for row in sums for total in row):
            builder.store(zero, total)
        twice = ir.Constant(ir.VectorType(_LANE, _LANES), [*range(_PATTERNS)] * 2)
        with cgutils.for_range(builder, builder.udiv(groups, at(_AT_ONCE))) as loop:
            both: list[Any] = [None] * _VECTORS
            for ahead in range(_AT_ONCE):
                group = builder.add(builder.mul(loop.index, at(_AT_ONCE)), at(ahead))
                pattern = builder.zext(builder.load(builder.gep(tables, [builder.add(tables_start, group)])), _INDEX)
                table = load(shared, builder.mul(pattern, at(_PATTERNS)), _TABLE)
                table = builder.shuffle_vector(table, ir.Constant(_TABLE, ir.Undefined), twice)
                place = builder.add(columns_start, builder.mul(group, at(_COLUMNS)))
                for v in range(_VECTORS):
                    counted = builder.call(shuffle, [table, load(columns, builder.add(place, at(v * _LANES)), _BYTES)])
                    both[v] = counted if both[v] is None else builder.add(both[v], counted)
            for v, counted in enumerate(both):
                shifted = builder.lshr(builder.bitcast(counted, _PAIRS), ir.Constant(_PAIRS, [4] * (_LANES // 2)))
                for total, row in ((sums[0][v], counted), (sums[1][v], builder.bitcast(shifted, _BYTES))):
                    builder.store(builder.add(builder.load(total), builder.and_(row, lower)), total)
        for r, row in enumerate(sums):
            for v, total in enumerate(row):
                pointer = builder.bitcast(
                    builder.gep(counts, [builder.add(counts_start, at(r * _COLUMNS + v * _LANES))]), _COUNTS.as_pointer()
                )
                before = builder.load(pointer)
                before.align = 2
                stored = builder.store(builder.add(before, builder.zext(builder.load(total), _COUNTS)), pointer)
                stored.align = 2
        return context.get_dummy_value()

    del typing_context
    return types.void(tables, tables_start, columns, columns_start, groups, shared, counts, counts_start), generate


_add_shared: Any = intrinsic(_shared_counts)


@numba.njit(cache=True, boundscheck=False)
def _patterns(words, first, count, out):  # type: ignore[no-untyped-def]
    """Set out[g, c] to pattern g of column first + c, for `count` columns; `out` is uint8 [groups, _COLUMNS], flat."""
    for w in range(len(words)):
        for g in range(_GROUPS):
            start = (w * _GROUPS + g) * _COLUMNS
            shift = np.uint64(g * _PATTERN_BITS)
            patterns, word = out[start : start + count], words[w, first : first + count]
            for c in range(count):
                patterns[c] = np.uint8((word[c] >> shift) & np.uint64(_PATTERNS - 1))


@numba.njit(cache=True, boundscheck=False)
def _tables(words, first, count, pairs, out):  # type: ignore[no-untyped-def]
    """Set `out` to the patterns of `count` rows, two to a byte, in reading order: uint8 [parts, pairs, _MOST_GROUPS], flat."""
    word = np.zeros(pairs * _ROWS, np.uint64)
    for w in range(len(words)):
        word[:count] = words[w, first : first + count]
        for g in range(_GROUPS):
            part, place = divmod(w * _GROUPS + g, _MOST_GROUPS)
            into = out[part * pairs * _MOST_GROUPS + place :]
            shift, one = np.uint64(g * _PATTERN_BITS), np.uint64(_PATTERNS - 1)
            for pair in range(pairs):
                upper, lower = (word[2 * pair + 1] >> shift) & one, (word[2 * pair] >> shift) & one
                into[pair * _MOST_GROUPS] = np.uint8(lower | upper << np.uint64(_PATTERN_BITS))


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_pairs(left, right, out):  # type: ignore[no-untyped-def]
    """Set int32 out[i, j] = sum_w popcount(left[w, i] & right[w, j]), for uint64 [W, a] and [W, b]."""
    words, rows = left.shape
    columns = right.shape[1]
    groups = (words * _GROUPS + _AT_ONCE - 1) // _AT_ONCE * _AT_ONCE
    parts = (groups + _MOST_GROUPS - 1) // _MOST_GROUPS
    tiles = (columns + _COLUMNS - 1) // _COLUMNS
    patterns = np.zeros((tiles, groups * _COLUMNS), np.uint8)
    for tile in numba.prange(tiles):
        _patterns(right, tile * _COLUMNS, min(_COLUMNS, columns - tile * _COLUMNS), patterns[tile])
    for block in numba.prange((rows + _BLOCK - 1) // _BLOCK):
        size = min(_BLOCK, rows - block * _BLOCK)
        pairs = (size + _ROWS - 1) // _ROWS
        tables = np.zeros(parts * pairs * _MOST_GROUPS, np.uint8)
        _tables(left, block * _BLOCK, size, pairs, tables)
        counts = np.empty(pairs * _ROWS * _COLUMNS, np.uint16)
        for tile in range(tiles):
            first = tile * _COLUMNS
            count = min(_COLUMNS, columns - first)
            for begin in range(0, max(parts, 1), _MOST_PARTS):  # without trials the counts are 0
                counts[:] = 0
                for part in range(begin, min(begin + _MOST_PARTS, parts)):
                    count_now = min(_MOST_GROUPS, groups - part * _MOST_GROUPS)
                    start = part * _MOST_GROUPS * _COLUMNS
                    for pair in range(pairs):
                        table = (part * pairs + pair) * _MOST_GROUPS
                        _add_shared(tables, table, patterns[tile], start, count_now, _SHARED, counts, pair * _ROWS * _COLUMNS)
                for i in range(size):
                    counted, row = counts[i * _COLUMNS : (i + 1) * _COLUMNS], out[block * _BLOCK + i, first : first + count]
                    if begin:
                        for c in range(count):
                            row[c] += np.int32(counted[c])
                    else:
                        for c in range(count):
                            row[c] = counted[c]
