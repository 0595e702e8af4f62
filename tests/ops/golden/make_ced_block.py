"""Writes ced_block.json: ced_block's and lr_ced_block's definitions, in 60 digits.

Pixels are looped over in Python, all numbers have 60 decimal digits (mpmath, which torch brings),
and a result is rounded once, when it is written as a float64. No derivative is derived: a gradient
is the difference of what ``sum(grad_output * block(...))`` is on both sides of a number, at a
distance of 1e-20, which leaves 40 digits of it. Inputs are sixteenths, so that they are exact.

    python tests/ops/golden/make_ced_block.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import mpmath
from make_upsample_equalize_concat import write
from mpmath import mpf

GOLDEN = Path(__file__).with_name("ced_block.json")
STEP = mpf(10) ** -20
mpmath.mp.dps = 60

Array = list[Any]  # numbers, in the order of a contiguous tensor

# name: block, x (N, C, H, W), k of each convolution, hidden, dilation, eps, with scale, keep
CASES: dict[str, tuple[Any, ...]] = {
    "ced_block, 7x7": ((1, 3, 2, 3), (7,), 5, None, 1e-6, True, None),
    "ced_block, stochastic depth": ((3, 2, 2, 2), (3,), 3, None, 0.25, True, [0.0, 1.25, 0.5]),
    "ced_block, plain": ((1, 4, 1, 2), (5,), 2, None, 0.01, False, None),
    "lr_ced_block, 7x7": ((1, 3, 3, 2), (7, 7), 4, 3, 1e-6, True, None),
    "lr_ced_block, stochastic depth": ((2, 2, 2, 3), (3, 5), 3, 2, 0.25, True, [1.5, 0.0]),
    "lr_ced_block, plain": ((1, 3, 2, 2), (3, 3), 2, 1, 0.01, False, None),
}


def gelu(x: mpf) -> mpf:
    return x * mpmath.ncdf(x)


def plus(a: Array, b: Array) -> Array:
    return [v + w for v, w in zip(a, b, strict=True)]


def convolve(
    image: Array, shape: Sequence[int], weight: Array, k: int, bias: Array, dilation: int
) -> Array:
    batch, channels, height, width = shape
    output = []
    for n, c, y, x in product(range(batch), range(channels), range(height), range(width)):
        total = bias[c]
        for ky, kx in product(range(k), range(k)):
            u, v = y + (ky - k // 2) * dilation, x + (kx - k // 2) * dilation
            if 0 <= u < height and 0 <= v < width:
                source = ((n * channels + c) * height + u) * width + v
                total += weight[(c * k + ky) * k + kx] * image[source]
        output.append(total)
    return output


def pixels(image: Array, shape: Sequence[int]) -> list[Array]:
    """The channels of each pixel."""
    batch, channels, height, width = shape
    size = height * width
    return [
        [image[(n * channels + c) * size + p] for c in range(channels)]
        for n in range(batch)
        for p in range(size)
    ]


def image_of(rows: list[Array], shape: Sequence[int]) -> Array:
    batch, channels, height, width = shape
    size = height * width
    places = product(range(batch), range(channels), range(size))
    return [rows[n * size + p][c] for n, c, p in places]


def normalize(row: Array, weight: Array, bias: Array, eps: mpf) -> Array:
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    normalized = [(v - mean) / mpmath.sqrt(variance + eps) for v in row]
    return [v * w + b for v, w, b in zip(normalized, weight, bias, strict=True)]


def linear(row: Array, weight: Array, bias: Array) -> Array:
    count = len(row)
    return [
        b + sum(weight[i * count + j] * value for j, value in enumerate(row))
        for i, b in enumerate(bias)
    ]


def block(
    inputs: Sequence[Array],
    shape: Sequence[int],
    kernels: Sequence[int],
    dilation: int | None,
    eps: float,
    keep: Sequence[float] | None,
) -> Array:
    x, *parameters = inputs
    rows = pixels(x, shape)
    for i, k in enumerate(kernels):
        weight, bias, norm_weight, norm_bias = parameters[4 * i : 4 * i + 4]
        step = dilation if i == 1 and dilation else 1
        convolved = convolve(image_of(rows, shape), shape, weight, k, bias, step)
        normed = [
            normalize(row, norm_weight, norm_bias, mpf(eps)) for row in pixels(convolved, shape)
        ]
        if len(kernels) == 1:
            rows = normed
        else:
            activated = [[gelu(v) for v in row] for row in normed]
            rows = [plus(*pair) for pair in zip(rows, activated, strict=True)]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, *scale = parameters[4 * len(kernels) :]
    size, output = shape[2] * shape[3], []
    for i, (row, start) in enumerate(zip(rows, pixels(x, shape), strict=True)):
        hidden = [gelu(h) for h in linear(row, fc1_weight, fc1_bias)]
        branch = linear(hidden, fc2_weight, fc2_bias)
        if scale:
            branch = [b * s for b, s in zip(branch, scale[0], strict=True)]
        factor = mpf(keep[i // size]) if keep else mpf(1)
        output.append(plus(start, [factor * b for b in branch]))
    return image_of(output, shape)


def run(
    shape: Sequence[int],
    kernels: Sequence[int],
    hidden: int,
    dilation: int | None,
    eps: float,
    scaled: bool,
    keep: list[float] | None,
    rng: random.Random,
) -> dict[str, Any]:
    channels = shape[1]
    shapes: list[Sequence[int]] = [shape]
    for k in kernels:
        shapes += [(channels, 1, k, k), *[(channels,)] * 3]
    shapes += [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    shapes += [(channels,)] if scaled else []

    def sixteenths(count: int) -> Array:
        return [mpf(rng.randint(-24, 24)) / 16 for _ in range(count)]

    inputs = [sixteenths(prod(s)) for s in shapes]
    grad_output = sixteenths(prod(shape))

    def result() -> Array:
        return block(inputs, shape, kernels, dilation, eps, keep)

    def loss() -> mpf:
        return sum(g * v for g, v in zip(grad_output, result(), strict=True))

    output, gradients = result(), []
    for values in inputs:
        gradient = []
        for i, value in enumerate(values):
            values[i] = value + STEP
            ahead = loss()
            values[i] = value - STEP
            gradient.append((ahead - loss()) / (2 * STEP))
            values[i] = value
        gradients.append(gradient)

    def floats(arrays: Sequence[Array]) -> list[list[float]]:
        return [[float(v) for v in array] for array in arrays]

    return {
        "dilation": dilation,
        "eps": eps,
        "keep": keep,
        "shapes": shapes,
        "inputs": floats(inputs),
        "output": floats([output])[0],
        "grad_output": floats([grad_output])[0],
        "gradients": floats(gradients),
    }


def main() -> None:
    write(GOLDEN, {name: run(*case, rng=random.Random(name)) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
