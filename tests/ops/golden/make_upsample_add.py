"""Writes upsample_add.json: the op's definition, in exact arithmetic.

As make_upsample_equalize_concat.py does: pixels are looped over in Python, all numbers are
fractions, and a result is rounded once, when it is written as a float64.

    python tests/ops/golden/make_upsample_add.py
"""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from make_upsample_equalize_concat import Image, Shape, random_image, taps, values, write

GOLDEN = Path(__file__).with_name("upsample_add.json")

# name: x (N, C, h, w), skip's size, align_corners
CASES: dict[str, tuple[Any, ...]] = {
    "up": ((2, 2, 3, 4), (6, 8), False),
    "up, align_corners": ((1, 2, 3, 5), (7, 9), True),
    "down": ((1, 3, 9, 7), (4, 3), False),
    "up and down": ((1, 2, 3, 11), (8, 5), False),
    "down, align_corners to one column": ((1, 2, 4, 5), (6, 1), True),
    "the same size": ((2, 2, 3, 4), (3, 4), False),
    "from one pixel": ((1, 3, 1, 1), (3, 4), False),
    "several vectors of channels": ((1, 35, 2, 2), (3, 4), False),
}


def run(
    shape: Shape, size: tuple[int, int], align_corners: bool, rng: random.Random
) -> dict[str, Any]:
    batch, channels, height, width = shape
    out_shape: Shape = (batch, channels, *size)
    x, skip, grad_output = (random_image(s, rng) for s in (shape, out_shape, out_shape))
    output = dict(skip)
    gradient: Image = dict.fromkeys(x, Fraction(0))
    for n, c, row, column in product(*map(range, out_shape)):
        out = (n, c, row, column)
        for source_y, weight_y in taps(row, height, size[0], align_corners).items():
            for source_x, weight_x in taps(column, width, size[1], align_corners).items():
                source = (n, c, source_y, source_x)
                output[out] += weight_y * weight_x * x[source]
                gradient[source] += weight_y * weight_x * grad_output[out]
    return {
        "align_corners": align_corners,
        "shape": shape,
        "x": values(x, shape),
        "output_shape": out_shape,
        "skip": values(skip, out_shape),
        "output": values(output, out_shape),
        "grad_output": values(grad_output, out_shape),
        "gradient": values(gradient, shape),
    }


def main() -> None:
    write(GOLDEN, {name: run(*case, rng=random.Random(name)) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
