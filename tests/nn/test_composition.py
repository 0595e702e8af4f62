"""Modules are the composition of their children, whatever was done to a child."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from compositions import MODELS, results
from torch import Tensor, nn
from treatments import TREATMENTS, treatable


def assert_same(ours: nn.Module, plain: nn.Module, inputs: Sequence[Tensor], told: Any) -> None:
    try:
        theirs = results(plain, inputs)
    except RuntimeError as error:  # PyTorch's: an in-place ReLU after a backward hook
        if "is being modified inplace" not in str(error):
            raise
        with pytest.raises(RuntimeError, match="is being modified inplace"):
            results(ours, inputs)
        return
    mine = results(ours, inputs)
    assert mine.keys() == theirs.keys(), told
    for name, expected in theirs.items():
        scale = expected.abs().max().clamp(min=1.0)
        error = (mine[name] - expected).abs().max()
        assert error <= 1e-9 * scale, f"{name} is {float(error):.1e} off after {told}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_one_treatment(name: str, treatment: str) -> None:
    """Of any child that takes it, one after the other on fresh models, at most three of them."""
    names = treatable(MODELS[name]()[0])
    random.Random(f"{name} {treatment}").shuffle(names)
    done = 0
    for child in names:
        ours, plain, inputs = MODELS[name]()
        applied = [
            TREATMENTS[treatment](model, child, random.Random(child)) for model in (ours, plain)
        ]
        assert applied[0] == applied[1]
        if applied[0]:
            assert_same(ours, plain, inputs, f"{treatment} of {child}")
            done += 1
        if done == 3:
            return


@pytest.mark.parametrize(
    "seed", [*range(24), *(pytest.param(s, marks=pytest.mark.slow) for s in range(24, 400))]
)
def test_sequences_of_treatments(seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(list(MODELS))
    ours, plain, inputs = MODELS[name]()
    names, told = treatable(ours), []
    for _ in range(rng.randint(2, 6)):
        treatment, child, step = rng.choice(list(TREATMENTS)), rng.choice(names), rng.random()
        applied = []
        for model in (ours, plain):
            try:
                applied.append(TREATMENTS[treatment](model, child, random.Random(step)))
            except AttributeError as error:  # the child went into another
                applied.append(str(error).partition("'")[0] == "")
        if applied[0]:
            told.append(f"{treatment} of {child}")
        assert applied[0] == applied[1], told
    assert_same(ours, plain, inputs, f"{name}: {', '.join(told)}")
