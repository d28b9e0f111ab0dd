"""Matrix products (GEMM) as a compiled building block: a few columns of C = A B, in tiles kept in vector registers.

`product` is the micro-kernel of a matrix library. As a building block it lets a whole epoch of a small network be one compiled call,
without work between the products. Every element of C is one sum, accumulated in the order of the depth with fused multiply-adds, so its
bits depend neither on the tile size nor on the machine's vector width.
"""

from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

#: Columns of a tile, and width of a panel of a matrix: one vector of the widest processors, two of others.
COLUMNS = 16
#: `product` takes multiples of this number of rows.
ROWS = 4
# Rows of a tile: enough to keep the multipliers busy without running out of registers, and fewer for the remainder.
_MOST, _FEWER = (8, 4) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (6, 4)

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, COLUMNS)
_INDEX = ir.IntType(64)
_LANE = ir.IntType(32)
_ALIGNMENT = 4


def _tile_of(rows: int) -> Any:
    """Return `product` for a number of rows, inlined into its caller."""

    def tile(
        typing_context: Any,
        a: Any,
        a_start: Any,
        a_row: Any,
        a_depth: Any,
        a_outer: Any,
        b: Any,
        b_start: Any,
        b_depth: Any,
        b_outer: Any,
        c: Any,
        c_start: Any,
        c_row: Any,
        outer: Any,
        depth: Any,
        first: Any,
        first_start: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def data(place: Any) -> Any:
                return context.make_array(signature.args[place])(context, builder, arguments[place]).data

            _, a_start, a_row, a_depth, a_outer, _, b_start, b_depth, b_outer, _, c_start, c_row, outer, depth, _, first_start = arguments
            a, b, c, first = data(0), data(5), data(9), data(14)
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{COLUMNS}f32")

            def vector(array: Any, place: Any) -> Any:
                return builder.bitcast(builder.gep(array, [place]), _VECTOR.as_pointer())

            def load(array: Any, place: Any) -> Any:
                loaded = builder.load(vector(array, place))
                loaded.align = _ALIGNMENT
                return loaded

            def spread(scalar: Any) -> Any:
                undefined = ir.Constant(_VECTOR, ir.Undefined)
                first = builder.insert_element(undefined, scalar, ir.Constant(_LANE, 0))
                return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_LANE, COLUMNS), [0] * COLUMNS))

            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(rows)]
            c_rows = [builder.add(c_start, builder.mul(c_row, ir.Constant(_INDEX, r))) for r in range(rows)]
            a_rows = [builder.add(a_start, builder.mul(a_row, ir.Constant(_INDEX, r))) for r in range(rows)]
            initial = load(first, first_start)
            for kept in sums:
                builder.store(initial, kept)
            with cgutils.for_range(builder, outer) as over:
                a_offset, b_offset = builder.mul(over.index, a_outer), builder.add(b_start, builder.mul(over.index, b_outer))
                with cgutils.for_range(builder, depth) as step:
                    b_vector = load(b, builder.add(b_offset, builder.mul(step.index, b_depth)))
                    a_place = builder.add(a_offset, builder.mul(step.index, a_depth))
                    for row, kept in zip(a_rows, sums, strict=True):
                        scalar = builder.load(builder.gep(a, [builder.add(a_place, row)]))
                        builder.store(builder.call(fma, [spread(scalar), b_vector, builder.load(kept)]), kept)
            for place, kept in zip(c_rows, sums, strict=True):
                stored = builder.store(builder.load(kept), vector(c, place))
                stored.align = _ALIGNMENT
            return context.get_dummy_value()

        del typing_context
        return types.void(
            a, a_start, a_row, a_depth, a_outer, b, b_start, b_depth, b_outer, c, c_start, c_row, outer, depth, first, first_start
        ), generate

    return intrinsic(tile)


def _transposed(typing_context: Any, source: Any, source_start: Any, source_row: Any, target: Any, target_start: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (context.make_array(signature.args[place])(context, builder, arguments[place]).data for place in (0, 3))
        _, source_start, source_row, _, target_start = arguments

        def vector(array: Any, start: Any, stride: Any, row: int) -> Any:
            place = builder.add(start, builder.mul(stride, ir.Constant(_INDEX, row)))
            return builder.bitcast(builder.gep(array, [place]), _VECTOR.as_pointer())

        rows = [builder.load(vector(source, source_start, source_row, row)) for row in range(COLUMNS)]
        for loaded in rows:
            loaded.align = _ALIGNMENT
        for bit in (1, 2, 4, 8):  # exchange the quarters of squares of growing size
            for row in (row for row in range(COLUMNS) if not row & bit):
                upper, lower = rows[row], rows[row | bit]
                first = [column if not column & bit else COLUMNS + (column ^ bit) for column in range(COLUMNS)]
                second = [column | bit if not column & bit else COLUMNS + column for column in range(COLUMNS)]
                for place, lanes in ((row, first), (row | bit, second)):
                    rows[place] = builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(_LANE, COLUMNS), lanes))
        for row, kept in enumerate(rows):
            builder.store(kept, vector(target, target_start, ir.Constant(_INDEX, COLUMNS), row)).align = _ALIGNMENT
        return context.get_dummy_value()

    del typing_context
    return types.void(source, source_start, source_row, target, target_start), generate


#: transpose(source, start, row, target, start) transposes COLUMNS rows of COLUMNS float32, `row` elements apart, into contiguous rows.
transpose: Any = intrinsic(_transposed)

_most, _fewer = _tile_of(_MOST), _tile_of(_FEWER)


@numba.njit(boundscheck=False, error_model="numpy")
def product(  # type: ignore[no-untyped-def]
    a, a_start, a_row, a_depth, a_outer, b, b_start, b_depth, b_outer, c, c_start, c_row, rows, outer, depth, first, first_start
):  # fmt: skip
    """Compute C[r, :] = first + sum over o, d of A[r, o, d] B[o, d, :], for `rows` rows and COLUMNS columns.

    All arrays are contiguous float32. Starts and strides are in elements; columns of B and C have stride 1.

    Args:
        a: holds A.
        a_start: index of A's first element.
        a_row: stride of A's rows.
        a_depth: stride of A's depth.
        a_outer: stride of A's outer depth.
        b: holds B.
        b_start: index of B's first element.
        b_depth: stride of B's depth.
        b_outer: stride of B's outer depth.
        c: holds C; written.
        c_start: index of C's first element.
        c_row: stride of C's rows.
        rows: a multiple of ROWS.
        outer: extent of the outer sum.
        depth: extent of the inner sum.
        first: holds the row from which all sums start: a bias, or zeros.
        first_start: index of the row's first element.
    """
    row = 0
    while row < rows:
        a_place, c_place, left = a_start + row * a_row, c_start + row * c_row, rows - row
        if left == _MOST or left >= _MOST + _FEWER:
            _most(a, a_place, a_row, a_depth, a_outer, b, b_start, b_depth, b_outer, c, c_place, c_row, outer, depth, first, first_start)
            row += _MOST
        else:
            _fewer(a, a_place, a_row, a_depth, a_outer, b, b_start, b_depth, b_outer, c, c_place, c_row, outer, depth, first, first_start)
            row += _FEWER
