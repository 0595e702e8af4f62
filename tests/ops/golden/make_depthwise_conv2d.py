"""Writes depthwise_conv2d.json: the op's definition, in exact arithmetic.

As make_upsample_equalize_concat.py does: pixels are looped over in Python, all numbers are
fractions, and a result is rounded once, when it is written as a float64.

    python tests/ops/golden/make_depthwise_conv2d.py
"""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from make_upsample_equalize_concat import Image, Shape, random_image, values, write

GOLDEN = Path(__file__).with_name("depthwise_conv2d.json")
ZERO = Fraction(0)

# name: x (N, C, H, W), kernel size, dilation, with bias
CASES: dict[str, tuple[Any, ...]] = {
    "7x7": ((1, 2, 8, 11), 7, 1, True),
    "7x7, dilated": ((1, 2, 9, 12), 7, 3, True),
    "5x5, several images": ((2, 1, 7, 5), 5, 1, False),
    "3x3, dilated beyond the image": ((1, 3, 4, 5), 3, 6, True),
    "3x3, several vectors of channels": ((1, 35, 2, 3), 3, 1, True),
    "9x9": ((1, 1, 6, 10), 9, 1, False),
    "1x1": ((2, 3, 2, 3), 1, 2, True),
    "one pixel": ((2, 2, 1, 1), 7, 1, True),
}


def run(shape: Shape, k: int, dilation: int, with_bias: bool, rng: random.Random) -> dict[str, Any]:
    _, channels, height, width = shape
    weight_shape: Shape = (channels, 1, k, k)
    x, grad_output = random_image(shape, rng), random_image(shape, rng)
    weight = random_image(weight_shape, rng)
    bias = [Fraction(rng.randint(-40, 40), 16) if with_bias else ZERO for _ in range(channels)]
    output: Image = {p: bias[p[1]] for p in x}
    gradient: Image = dict.fromkeys(x, ZERO)
    weight_gradient: Image = dict.fromkeys(weight, ZERO)
    bias_gradient = [ZERO] * channels
    for n, c, row, column in x:
        here = (n, c, row, column)
        bias_gradient[c] += grad_output[here]
        for ky, kx in product(range(k), range(k)):
            y, z = row + (ky - k // 2) * dilation, column + (kx - k // 2) * dilation
            if not (0 <= y < height and 0 <= z < width):
                continue
            there, tap = (n, c, y, z), (c, 0, ky, kx)
            output[here] += weight[tap] * x[there]
            gradient[there] += weight[tap] * grad_output[here]
            weight_gradient[tap] += x[there] * grad_output[here]
    return {
        "dilation": dilation,
        "shape": shape,
        "x": values(x, shape),
        "weight_shape": weight_shape,
        "weight": values(weight, weight_shape),
        "bias": [float(v) for v in bias] if with_bias else None,
        "output": values(output, shape),
        "grad_output": values(grad_output, shape),
        "gradient": values(gradient, shape),
        "weight_gradient": values(weight_gradient, weight_shape),
        "bias_gradient": [float(v) for v in bias_gradient] if with_bias else None,
    }


def main() -> None:
    write(GOLDEN, {name: run(*case, rng=random.Random(name)) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
