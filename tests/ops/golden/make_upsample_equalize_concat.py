"""Writes upsample_equalize_concat.json: the op's definition, in exact rational arithmetic.

Nothing here is shared with the reference or the kernels: pixels are looped over in Python, all
numbers are fractions, and a result is rounded once, when it is written as a float64. Inputs are
sixteenths, so that they are exact too.

    python tests/ops/golden/make_upsample_equalize_concat.py
"""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("upsample_equalize_concat.json")

Image = dict[tuple[int, int, int, int], Fraction]  # (n, c, y, x) -> value
Shape = tuple[int, int, int, int]

# name: batch, levels (C, H, W), size, mean, std, align_corners
CASES: dict[str, tuple[Any, ...]] = {
    "up": (2, [(2, 8, 8), (3, 4, 4), (1, 2, 1)], (8, 8), None, None, False),
    "down": (1, [(2, 9, 13), (3, 20, 7), (1, 5, 5)], (5, 5), None, [0.5, 2.5, 1.0], False),
    "odd": (1, [(1, 3, 7), (3, 5, 2), (2, 13, 11)], (13, 11), [0.25, -1.5, 0.75], None, False),
    "align_corners": (2, [(1, 3, 5), (2, 2, 2), (1, 11, 9)], (7, 9), None, [0.1, 3, 0.7], True),
    "align_corners to one row": (
        1,
        [(2, 4, 3), (1, 1, 1), (1, 1, 8)],
        (1, 8),
        [1, 2, 3],
        None,
        True,
    ),
    "pooled, mean and std": (
        1,
        [(3, 10, 13), (9, 1, 1), (2, 2, 2), (2, 3, 3), (1, 6, 6)],
        (10, 13),
        [0.398942, -0.3, 0.2, 7.0, 0.0],
        [0.583796, 0.4, 0.3, 0.2, 10.0],
        False,
    ),
    "many channels": (1, [(73, 2, 3)], (3, 4), [0.5], [1.5], False),
}


def taps(
    out_position: int, in_size: int, out_size: int, align_corners: bool
) -> dict[int, Fraction]:
    """The source positions that one output position reads, with their weights."""
    if align_corners:
        source = Fraction(out_position * (in_size - 1), max(out_size - 1, 1))
    else:
        half = Fraction(1, 2)
        source = max((out_position + half) * Fraction(in_size, out_size) - half, Fraction(0))
    lower = min(math.floor(source), in_size - 1)
    upper = min(lower + 1, in_size - 1)
    weights = {lower: Fraction(0), upper: Fraction(0)}
    weights[lower] += 1 - (source - lower)
    weights[upper] += source - lower
    return weights


def random_image(shape: Shape, rng: random.Random) -> Image:
    return {p: Fraction(rng.randint(-40, 40), 16) for p in product(*map(range, shape))}


def values(image: Image, shape: Shape) -> list[float]:
    """In the order of a contiguous tensor, each rounded to the nearest float64."""
    return [float(image[p]) for p in product(*map(range, shape))]


def run(
    batch: int,
    levels: list[tuple[int, int, int]],
    size: tuple[int, int],
    mean: list[float] | None,
    std: list[float] | None,
    align_corners: bool,
    rng: random.Random,
) -> dict[str, Any]:
    shapes: list[Shape] = [(batch, *level) for level in levels]
    features = [random_image(shape, rng) for shape in shapes]
    out_shape: Shape = (batch, sum(c for c, _, _ in levels), *size)
    grad_output = random_image(out_shape, rng)
    output: Image = {}
    gradients: list[Image] = [dict.fromkeys(feature, Fraction(0)) for feature in features]

    first_channel = 0
    for i, (_, channels, height, width) in enumerate(shapes):
        level_mean = Fraction(mean[i]) if mean else Fraction(0)
        level_std = Fraction(std[i]) if std else Fraction(1)
        for n, c, y, x in product(range(batch), range(channels), range(size[0]), range(size[1])):
            out = (n, first_channel + c, y, x)
            upsampled = Fraction(0)
            for source_y, weight_y in taps(y, height, size[0], align_corners).items():
                for source_x, weight_x in taps(x, width, size[1], align_corners).items():
                    source = (n, c, source_y, source_x)
                    weight = weight_y * weight_x
                    upsampled += weight * features[i][source]
                    gradients[i][source] += weight / level_std * grad_output[out]
            output[out] = (upsampled - level_mean) / level_std
        first_channel += channels

    return {
        "size": size,
        "mean": mean,
        "std": std,
        "align_corners": align_corners,
        "shapes": shapes,
        "features": [values(f, s) for f, s in zip(features, shapes, strict=True)],
        "output_shape": out_shape,
        "output": values(output, out_shape),
        "grad_output": values(grad_output, out_shape),
        "gradients": [values(g, s) for g, s in zip(gradients, shapes, strict=True)],
    }


def write(path: Path, cases: dict[str, dict[str, Any]]) -> None:
    """One line per list of numbers: readable differences, and floats that read back as written."""
    text = ",\n".join(
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in case.items())
        + "\n}"
        for name, case in cases.items()
    )
    path.write_text("{\n" + text + "\n}\n")
    print(f"{path}: {len(cases)} cases, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    write(GOLDEN, {name: run(*case, rng=random.Random(name)) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
