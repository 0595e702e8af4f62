"""Faults planted in the PTX of kernels are noticed by what runs it on the CPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from inputs import fast_and_slow
from torch import Tensor
from triton_interpreter import INTERPRETING

pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETING:
    pytest.skip("kernels run otherwise", allow_module_level=True)

from ptx.launch import Launcher
from ptx.parse import PTXError

from fastfuse.ops.depthwise_conv2d import triton as depthwise_kernels
from fastfuse.ops.pointwise import triton as pointwise_kernels
from fastfuse.ops.upsample_equalize_concat import triton as concat_kernels

pytestmark = pytest.mark.usefixtures("poisoned")


def _layer_norm_backward() -> list[Tensor]:
    x, grad, grad_x = torch.randn(3, 40, 17)
    weight, bias, *sums = torch.randn(4, 17)
    pointwise_kernels.layer_norm_backward_into(grad_x, *sums, grad, x, weight, bias, 1e-6, True)
    return [grad_x, *sums]


def _bias_gelu_backward() -> list[Tensor]:
    grad, out, hidden = torch.randn(3, 40, 17)
    bias, sums = torch.randn(2, 17)
    pointwise_kernels.bias_gelu_backward_into(grad, out, sums, hidden, bias)
    return [grad, out, sums]


def _depthwise_backward() -> list[Tensor]:
    grad, x = torch.randn(2, 1, 5, 6, 7)
    return list(depthwise_kernels.backward_weight(grad, x, 3, 1))


def _concat_backward() -> list[Tensor]:
    grad = torch.randn(1, 8, 7, 5)
    sizes = [0, 5], [5, 3], [7, 3], [5, 2]
    return concat_kernels.backward(grad, *sizes, None, False, False)


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "layer_norm": _layer_norm_backward,
    "bias_gelu": _bias_gelu_backward,
    "depthwise_conv2d": _depthwise_backward,
    "concat": _concat_backward,
}
# What is replaced by what, and the share of such faults that have to be noticed: some masks are
# true of all threads or tell which of several store the same, some accesses have no thread.
FAULTS = {
    "no barrier": (r"bar\.sync\s+0;", "", 0.8),
    "no mask": (r"@!?%p\d+ ((?:ld|st)\.)", r"\1", 0.6),
    "another address": (r"\[ ?(%rd?\d+)(?: \+ 0 )?\]", r"[\1 + 4]", 0.6),
}


def _results(call: Callable[[], list[Tensor]], edit: Callable[[str], str | None]) -> list[Tensor]:
    """``edit`` gives the PTX to run, or None: as it is."""
    torch.manual_seed(0)
    with Launcher(90, lambda text: edit(text) or text):
        return call()


def _mutants(texts: list[str], pattern: str, replacement: str) -> Iterator[tuple[str, str]]:
    """Kernels, and what they are with one fault."""
    for text in texts:
        for found in re.finditer(pattern, text):
            yield text, text[: found.start()] + found.expand(replacement) + text[found.end() :]


@fast_and_slow(
    "call fault",
    [*product(["concat"], FAULTS), ("layer_norm", "no barrier")],
    product(CALLS, FAULTS),
    ids=lambda name: name.replace(" ", "_"),
)
def test_faults_are_noticed(call: str, fault: str) -> None:
    """By a report, or by other values; a missing barrier never by these alone."""
    pattern, replacement, share = FAULTS[fault]
    texts: list[str] = []
    expected = _results(CALLS[call], texts.append)
    outcomes: Counter[str] = Counter()
    for text, mutant in _mutants(texts, pattern, replacement):
        try:
            results = _results(CALLS[call], {text: mutant}.get)
        except PTXError:
            outcomes["reported"] += 1
        else:
            same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
            outcomes["without effect" if same else "other values"] += 1
    print(call, fault, dict(outcomes))
    assert outcomes["reported"] > 0, outcomes
    assert outcomes["without effect"] <= (1 - share) * outcomes.total(), outcomes
    assert outcomes["other values"] == 0 or fault != "no barrier", outcomes
