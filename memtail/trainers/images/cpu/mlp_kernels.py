"""Compiled training of fully connected networks: many steps of one network in one call, on one thread.

A matrix whose rows hold features is stored in panels of COLUMNS features: element (row, feature) lies at
[feature // COLUMNS, row, feature % COLUMNS]. `product` of `gemm` reads and writes a panel's row in one piece, for activations (a row per
example) and for weights (a row per input feature). Numbers of features are padded to whole panels, numbers of examples to whole tiles.
Padded weights, biases and gradients are 0 and stay 0.

In the signatures: `sizes` int64 [L + 1], padded numbers of features from input to logits; `weights`, `biases` int64 [L], starts of each
layer's parameters in `values`; `starts` int64 [L + 1], starts of each layer's outputs in `outputs` and in `deltas` (entry 0 is unused).
"""

import numba
import numpy as np

from memtail.trainers.images.cpu.gemm import COLUMNS, ROWS, product, transpose

# Input features per update of the weights: their gradients stay in the first-level cache.
_HEIGHT = 48

# The compiler vectorises loops that start from 0, and not those over a range of a larger array.


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _rectify(panel):  # type: ignore[no-untyped-def]
    """Apply ReLU in place; NaN stays."""
    for i in range(len(panel)):
        panel[i] *= np.float32(panel[i] > 0)


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def forward(x, padded, values, sizes, weights, biases, starts, outputs):  # type: ignore[no-untyped-def]
    """Compute the `outputs` of every layer for the examples in `x`, `padded` to whole tiles."""
    layers = len(weights)
    for layer in range(layers):
        features, last = sizes[layer], layer == layers - 1
        for panel in range(sizes[layer + 1] // COLUMNS):
            out = starts[layer + 1] + panel * padded * COLUMNS
            bias = biases[layer] + panel * COLUMNS
            weight = weights[layer] + panel * features * COLUMNS
            if layer == 0:
                product(
                    x, 0, features, 1, 0, values, weight, COLUMNS, 0, outputs, out, COLUMNS, padded, 1, features, values, bias
                )  # fmt: skip
            else:
                across, down, panels = padded * COLUMNS, COLUMNS * COLUMNS, features // COLUMNS
                product(
                    outputs, starts[layer], COLUMNS, 1, across, values, weight, COLUMNS, down, outputs, out, COLUMNS, padded,
                    panels, COLUMNS, values, bias,
                )  # fmt: skip
            if not last:
                _rectify(outputs[out : out + padded * COLUMNS])


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _exponentials(values):  # type: ignore[no-untyped-def]
    """Compute e^x of float32 x <= 0 in place, to the last bit or two, in vector arithmetic (Cephes, expf). NaN stays."""
    for i in range(len(values)):
        x = np.float32(-87) if values[i] < np.float32(-87) else values[i]
        power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        x = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
        series = np.float32(1.9875691500e-4)
        series = series * x + np.float32(1.3981999507e-3)
        series = series * x + np.float32(8.3334519073e-3)
        series = series * x + np.float32(4.1665795894e-2)
        series = series * x + np.float32(1.6666665459e-1)
        series = series * x + np.float32(5.0000001201e-1)
        scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
        values[i] = (series * x * x + x + np.float32(1)) * scale


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _loss(logits, start, rows, padded, classes, labels, first, smoothing, deltas):  # type: ignore[no-untyped-def]
    """Return the summed cross-entropy of a batch; write the gradient of its mean, (softmax - target) / rows, into `deltas`."""
    total = 0.0
    stop = start + (classes + COLUMNS - 1) // COLUMNS * padded * COLUMNS
    deltas[start:stop] = 0
    for row in range(rows):
        largest = logits[start + row * COLUMNS]
        for c in range(classes):
            largest = max(largest, logits[start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS])
        for c in range(classes):
            place = start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS
            deltas[place] = logits[place] - largest
        label = labels[first + row]
        own = start + (label // COLUMNS * padded + row) * COLUMNS + label % COLUMNS
        total -= (1 - smoothing) * deltas[own]
        if smoothing:
            for c in range(classes):
                total -= smoothing * deltas[start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS] / classes
    _exponentials(deltas[start:stop])
    even = np.float32(smoothing / classes / rows)
    for row in range(rows):
        norm = np.float32(0)
        for c in range(classes):
            norm += deltas[start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS]
        total += np.log(norm)
        scale = np.float32(1 / (norm * rows))
        for c in range(classes):
            place = start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS
            deltas[place] = deltas[place] * scale - even
        label = labels[first + row]
        for c in range(classes, (stop - start) // padded):  # padding must stay 0
            deltas[start + (c // COLUMNS * padded + row) * COLUMNS + c % COLUMNS] = 0
        deltas[start + (label // COLUMNS * padded + row) * COLUMNS + label % COLUMNS] -= np.float32((1 - smoothing) / rows)
    for panel in range(start, stop, padded * COLUMNS):
        deltas[panel + rows * COLUMNS : panel + padded * COLUMNS] = 0
    return total


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _update(values, momenta, squares, start, gradient, count, rates, constants):  # type: ignore[no-untyped-def]
    """Update `count` values from `start` on. The type of `squares` decides, when this is compiled, by which optimizer."""
    if squares is None:
        momentum, decay, nesterov = constants[0], constants[1], constants[2]
        _descend(values[start : start + count], momenta[start : start + count], gradient, count, rates[0], momentum, decay, nesterov)
    else:
        _adapt(
            values[start : start + count], momenta[start : start + count], squares[start : start + count], gradient, count, rates, constants
        )  # fmt: skip


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _descend(value, kept, gradient, count, rate, momentum, decay, nesterov):  # type: ignore[no-untyped-def]
    """Update `count` values by stochastic gradient descent as in `torch.optim.SGD`."""
    ahead, along = (momentum, np.float32(1)) if nesterov else (np.float32(1), np.float32(0))
    for i in range(count):
        g = gradient[i] + decay * value[i]
        kept[i] = momentum * kept[i] + g
        value[i] -= rate * (ahead * kept[i] + along * g)


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _adapt(value, mean, square, gradient, count, rates, constants):  # type: ignore[no-untyped-def]
    """Update `count` values as `torch.optim.Adam` and `torch.optim.AdamW` do."""
    rate, root, kept = rates[0], rates[1], rates[2]
    news, old, new, eps, decay = constants[0], constants[1], constants[2], constants[3], constants[4]
    for i in range(count):
        g = gradient[i] + decay * value[i]
        mean[i] += news * (g - mean[i])
        square[i] = old * square[i] + new * g * g
        value[i] = kept * value[i] - rate * mean[i] / (np.sqrt(square[i]) / root + eps)


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _mask(delta, output):  # type: ignore[no-untyped-def]
    """Set the gradient to 0 where ReLU gave 0."""
    for i in range(len(delta)):
        delta[i] = delta[i] if output[i] > 0 else np.float32(0)


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _add_rows(panel, sums, out):  # type: ignore[no-untyped-def]
    """Write the sums of a panel's columns into the first COLUMNS of `out`; `sums` accumulates four rows at a time."""
    sums[:] = 0
    for start in range(0, len(panel), 4 * COLUMNS):
        rows = panel[start : start + 4 * COLUMNS]
        for i in range(4 * COLUMNS):
            sums[i] += rows[i]
    for o in range(COLUMNS):
        out[o] = sums[o] + sums[COLUMNS + o] + sums[2 * COLUMNS + o] + sums[3 * COLUMNS + o]


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _transpose(values, start, inputs, out, transposed):  # type: ignore[no-untyped-def]
    """Transpose a layer's weights: a row per output, in panels of inputs."""
    for panel in range(out // COLUMNS):
        for i in range(0, inputs, COLUMNS):
            transpose(values, start + (panel * inputs + i) * COLUMNS, COLUMNS, transposed, (i * out // COLUMNS + panel * COLUMNS) * COLUMNS)


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _normalise(pixels, shift, scale, rows, padded, features, x):  # type: ignore[no-untyped-def]
    """Write `rows` normalised examples into `x` [padded, features], and 0 into its padding."""
    count = len(shift)
    for row in range(rows):
        example, normalised = pixels[row * count : (row + 1) * count], x[row * features : row * features + count]
        for i in range(count):
            normalised[i] = (np.float32(example[i]) + shift[i]) * scale[i]
    x[rows * features : padded * features] = 0


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _train(  # type: ignore[no-untyped-def]
    pixels, labels, shift, scale, bounds, rates, constants, squares, classes, values, momenta, sizes, weights, biases, starts, x, outputs,
    deltas, transposed, smoothing,
):  # fmt: skip
    """Take the steps of `train_steps` on one network; return the sum of its examples' losses."""
    layers = len(weights)
    total = 0.0
    gradient = np.empty(_HEIGHT * COLUMNS, np.float32)
    zeros, four_rows = np.zeros(COLUMNS, np.float32), np.empty(4 * COLUMNS, np.float32)
    for step in range(len(rates)):
        first, rows = bounds[step], bounds[step + 1] - bounds[step]
        padded = (rows + ROWS - 1) // ROWS * ROWS
        _normalise(pixels[first * len(shift) :], shift, scale, rows, padded, sizes[0], x)
        forward(x, padded, values, sizes, weights, biases, starts, outputs)
        total += _loss(outputs, starts[layers], rows, padded, classes, labels, first, smoothing, deltas)
        for layer in range(layers - 1, -1, -1):
            inputs, out = sizes[layer], sizes[layer + 1]
            if layer:
                _transpose(values, weights[layer], inputs, out, transposed)
                across, down = padded * COLUMNS, COLUMNS * COLUMNS
                for panel in range(inputs // COLUMNS):
                    place = starts[layer] + panel * padded * COLUMNS
                    product(
                        deltas, starts[layer + 1], COLUMNS, 1, across, transposed, panel * out * COLUMNS, COLUMNS, down, deltas, place,
                        COLUMNS, padded, out // COLUMNS, COLUMNS, zeros, 0,
                    )  # fmt: skip
                    _mask(deltas[place : place + padded * COLUMNS], outputs[place : place + padded * COLUMNS])
            for panel in range(out // COLUMNS):
                start = starts[layer + 1] + panel * padded * COLUMNS
                _add_rows(deltas[start : start + padded * COLUMNS], four_rows, gradient)
                bias = biases[layer] + panel * COLUMNS
                _update(values, momenta, squares, bias, gradient, COLUMNS, rates[step], constants)
            for block in range(0, inputs, _HEIGHT):
                height = min(_HEIGHT, inputs - block)
                for panel in range(out // COLUMNS):
                    start = starts[layer + 1] + panel * padded * COLUMNS
                    if layer == 0:
                        product(x, block, 1, inputs, 0, deltas, start, COLUMNS, 0, gradient, 0, COLUMNS, height, 1, padded, zeros, 0)
                    else:
                        for part in range(0, height, COLUMNS):
                            a_start = starts[layer] + (block + part) * padded
                            product(
                                outputs, a_start, 1, COLUMNS, 0, deltas, start, COLUMNS, 0, gradient, part * COLUMNS, COLUMNS, COLUMNS,
                                1, padded, zeros, 0,
                            )  # fmt: skip
                    place = weights[layer] + (panel * inputs + block) * COLUMNS
                    _update(values, momenta, squares, place, gradient, height * COLUMNS, rates[step], constants)
    return total


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def train_steps(  # type: ignore[no-untyped-def]
    pixels, labels, shift, scale, bounds, rates, constants, squares, classes, values, momenta, sizes, weights, biases, starts, x, outputs,
    deltas, transposed, smoothing, losses,
):  # fmt: skip
    """Take one step of the optimizer per batch, on one network after another, each from the processor's cache.

    Args:
        pixels: uint8 or float32 [S, B * P], the examples of all batches, for each network.
        labels: int64 [S, B], of these examples.
        shift: float32 [P]; the first layer takes (pixel + shift) * scale.
        scale: float32 [P].
        bounds: int64 [steps + 1], start of each batch and stop of the last.
        rates: float32 [steps, 3]: of SGD the learning rate; of Adam the learning rate over the correction of the mean, the root of the
            correction of the mean square, and the factor of the parameters (1 less their decoupled decay).
        constants: float32: of SGD momentum, weight decay, and 1 for Nesterov's momentum; of Adam 1 - beta 1, beta 2, 1 - beta 2, eps, and
            the weight decay that is part of the gradient.
        squares: float32 [S, ...], of Adam the means of the squares of their gradients, updated; None for SGD.
        classes: number of logits, without padding.
        values: float32 [S, ...], parameters of the networks; updated.
        momenta: float32 [S, ...], their momenta, of Adam the means of their gradients; updated.
        sizes: see the module.
        weights: see the module.
        biases: see the module.
        starts: see the module.
        x: float32 workspace for a batch.
        outputs: float32 workspace for the layers' outputs.
        deltas: float32 workspace for the gradients of the outputs.
        transposed: float32 workspace for the transposed weights of a layer.
        smoothing: float32, the label smoothing.
        losses: float32 [S]; receives the sums of the examples' losses.
    """
    for network in range(len(losses)):
        losses[network] = _train(
            pixels[network], labels[network], shift, scale, bounds, rates, constants, None if squares is None else squares[network],
            classes, values[network], momenta[network], sizes, weights, biases, starts, x, outputs, deltas, transposed, smoothing,
        )  # fmt: skip
