"""Writes fusion_conv2d.json: tap_sum's and fusion_conv2d's definitions, in exact arithmetic.

As make_upsample_equalize_concat.py does, whose sampling rule this takes: pixels are looped over in
Python, all numbers are fractions, and a result is rounded once, when it is written as a float64.

    python tests/ops/golden/make_fusion_conv2d.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from make_upsample_equalize_concat import Image, Shape, random_image, taps, values, write

GOLDEN = Path(__file__).with_name("fusion_conv2d.json")
ZERO = Fraction(0)

# name: taps (N, C, h, w) of each tap, size, kernel size, padding, align_corners
TAP_SUMS: dict[str, tuple[Any, ...]] = {
    "up": ((2, 2, 3, 4), (6, 8), 3, 1, False),
    "down, no padding": ((1, 2, 7, 5), (5, 4), 3, 0, False),
    "wide padding, align_corners": ((1, 1, 2, 3), (5, 4), 3, 3, True),
    "5x5": ((1, 1, 3, 2), (4, 5), 5, 2, False),
    "1x1": ((1, 3, 2, 3), (3, 7), 1, 0, False),
}
# name: batch, levels (C, H, W), outputs, size, kernel size, padding, mean, std, align_corners
FUSIONS: dict[str, tuple[Any, ...]] = {
    "pyramid": (2, [(1, 6, 8), (7, 3, 4), (6, 1, 2)], 3, (6, 8), 3, 1, None, None, False),
    "mean and std": (
        1, [(2, 6, 6), (8, 3, 3), (7, 2, 1)], 3, (6, 6), 3, 1, [1.5, -3, 0.3], [0.5, 2, 1.1], False,
    ),
    "slightly smaller and larger": (
        1, [(1, 5, 5), (2, 4, 4), (2, 7, 9)], 3, (5, 5), 3, 1, [2, 0.7, -1], None, True,
    ),
    "1x1, no level of the size": (
        1, [(10, 2, 3), (12, 3, 1)], 4, (6, 7), 1, 0, [0.25, 4], [0.5, 3], False,
    ),
    "wide padding": (1, [(6, 2, 2), (1, 4, 5)], 2, (4, 5), 3, 3, [1, -2], [3, 0.1], False),
    "5x5, no padding": (1, [(1, 6, 6), (5, 2, 3)], 2, (6, 6), 5, 0, [1, 2], None, True),
}  # fmt: skip


def sources(
    y: int, x: int, source: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> Iterator[tuple[int, int, Fraction]]:
    """What pixel (y, x) of the upsampled map reads, and nothing outside of it."""
    if not (0 <= y < size[0] and 0 <= x < size[1]):
        return
    for source_y, weight_y in taps(y, source[0], size[0], align_corners).items():
        for source_x, weight_x in taps(x, source[1], size[1], align_corners).items():
            yield source_y, source_x, weight_y * weight_x


def tap_sum(
    shape: Shape,
    size: tuple[int, int],
    k: int,
    padding: int,
    align_corners: bool,
    rng: random.Random,
) -> dict[str, Any]:
    batch, channels, height, width = shape
    taps_shape: Shape = (batch, k * k * channels, height, width)
    out_shape: Shape = (batch, channels, *(s + 2 * padding - k + 1 for s in size))
    image, grad_output = random_image(taps_shape, rng), random_image(out_shape, rng)
    offsets = [Fraction(rng.randint(-40, 40), 16) for _ in range(taps_shape[1])]
    output: Image = dict.fromkeys(grad_output, ZERO)
    gradient: Image = dict.fromkeys(image, ZERO)
    offsets_gradient = [ZERO] * len(offsets)
    for (n, c, y, x), tap in product(grad_output, range(k * k)):
        channel, grad = tap * channels + c, grad_output[n, c, y, x]
        u, v = y + tap // k - padding, x + tap % k - padding
        for source_y, source_x, weight in sources(u, v, (height, width), size, align_corners):
            source = (n, channel, source_y, source_x)
            output[n, c, y, x] += weight * image[source]
            gradient[source] += weight * grad
        if 0 <= u < size[0] and 0 <= v < size[1]:
            output[n, c, y, x] += offsets[channel]
            offsets_gradient[channel] += grad
    return {
        "size": size,
        "kernel_size": k,
        "padding": padding,
        "align_corners": align_corners,
        "taps_shape": taps_shape,
        "taps": values(image, taps_shape),
        "offsets": [float(v) for v in offsets],
        "output_shape": out_shape,
        "output": values(output, out_shape),
        "grad_output": values(grad_output, out_shape),
        "taps_gradient": values(gradient, taps_shape),
        "offsets_gradient": [float(v) for v in offsets_gradient],
    }


def fusion(
    batch: int,
    levels: list[tuple[int, int, int]],
    outputs: int,
    size: tuple[int, int],
    k: int,
    padding: int,
    mean: list[float] | None,
    std: list[float] | None,
    align_corners: bool,
    rng: random.Random,
) -> dict[str, Any]:
    """Equalized pixels as they are defined, convolved as it is defined; gradients back again."""
    shapes: list[Shape] = [(batch, *level) for level in levels]
    features = [random_image(shape, rng) for shape in shapes]
    total = sum(c for c, _, _ in levels)
    weight_shape: Shape = (outputs, total, k, k)
    out_shape: Shape = (batch, outputs, *(s + 2 * padding - k + 1 for s in size))
    weight, grad_output = random_image(weight_shape, rng), random_image(out_shape, rng)
    bias = [Fraction(rng.randint(-40, 40), 16) for _ in range(outputs)]

    pixels = list(product(range(batch), range(size[0]), range(size[1])))
    equalized: Image = {}
    first = 0
    for i, (channels, *source) in enumerate(levels):
        level_mean = Fraction(mean[i]) if mean else ZERO
        level_std = Fraction(std[i]) if std else Fraction(1)
        for (n, y, x), c in product(pixels, range(channels)):
            upsampled = ZERO
            for source_y, source_x, w in sources(y, x, source, size, align_corners):
                upsampled += w * features[i][n, c, source_y, source_x]
            equalized[n, first + c, y, x] = (upsampled - level_mean) / level_std
        first += channels

    output = {p: bias[p[1]] for p in grad_output}
    weight_gradient: Image = dict.fromkeys(weight, ZERO)
    equalized_gradient: Image = dict.fromkeys(equalized, ZERO)
    for (n, o, y, x), ky, kx in product(grad_output, range(k), range(k)):
        u, v, grad = y + ky - padding, x + kx - padding, grad_output[n, o, y, x]
        if not (0 <= u < size[0] and 0 <= v < size[1]):
            continue
        for c in range(total):
            output[n, o, y, x] += weight[o, c, ky, kx] * equalized[n, c, u, v]
            weight_gradient[o, c, ky, kx] += grad * equalized[n, c, u, v]
            equalized_gradient[n, c, u, v] += grad * weight[o, c, ky, kx]

    gradients: list[Image] = [dict.fromkeys(feature, ZERO) for feature in features]
    first = 0
    for i, (channels, *source) in enumerate(levels):
        level_std = Fraction(std[i]) if std else Fraction(1)
        for (n, y, x), c in product(pixels, range(channels)):
            grad = equalized_gradient[n, first + c, y, x] / level_std
            for source_y, source_x, w in sources(y, x, source, size, align_corners):
                gradients[i][n, c, source_y, source_x] += w * grad
        first += channels

    bias_gradient = [
        sum((g for p, g in grad_output.items() if p[1] == o), ZERO) for o in range(outputs)
    ]
    return {
        "size": size,
        "mean": mean,
        "std": std,
        "padding": padding,
        "align_corners": align_corners,
        "shapes": shapes,
        "features": [values(f, s) for f, s in zip(features, shapes, strict=True)],
        "weight_shape": weight_shape,
        "weight": values(weight, weight_shape),
        "bias": [float(v) for v in bias],
        "output_shape": out_shape,
        "output": values(output, out_shape),
        "grad_output": values(grad_output, out_shape),
        "gradients": [values(g, s) for g, s in zip(gradients, shapes, strict=True)],
        "weight_gradient": values(weight_gradient, weight_shape),
        "bias_gradient": [float(v) for v in bias_gradient],
    }


def main() -> None:
    cases = {f"tap_sum, {n}": tap_sum(*c, rng=random.Random(n)) for n, c in TAP_SUMS.items()}
    for name, case in FUSIONS.items():
        cases[f"fusion_conv2d, {name}"] = fusion(*case, rng=random.Random(name))
    write(GOLDEN, cases)


if __name__ == "__main__":
    main()
