"""The MLP of blocks as one kernel: values, what they write, determinism, routes, bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import every_dtype, wide
from torch import Tensor

import fastfuse
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

OPS = torch.ops.fastfuse
EPS = 1e-6

# Pixels, channels, hidden: parts of vectors, of panels, of rows at a time; several products deep.
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (61, 24, 96),
    (50, 17, 68),
    (33, 300, 53),
    (0, 8, 32),
]


@contextmanager
def kernel_sizes(**changes: int) -> Iterator[None]:
    policy = policy_of("cpu")
    assert policy.kernels is not None
    with use_policy(policy, kernels=dataclasses.replace(policy.kernels, **changes)):
        yield


# Tiles of few panels, and several parts however few the pixels.
SMALL = {"mlp_bytes": 1, "mlp_parts": 3}


def surrounded(rows: int, channels: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
    """A matrix between values that must not be read, nor written."""
    whole = torch.full((rows + 2, channels + 3), torch.nan, dtype=dtype)
    matrix = whole[1:-1, 2:-1]
    matrix.copy_(torch.randn(matrix.shape) if fill is None else torch.full(matrix.shape, fill))
    return matrix


def is_intact(matrix: Tensor) -> bool:
    """Whether what surrounds it is as it was."""
    base = matrix._base
    assert base is not None
    around = torch.ones_like(base, dtype=torch.bool)
    around[1:-1, 2:-1] = False
    return bool(base[around].isnan().all())


class Case:
    """An MLP's inputs, and what its ops and its definition make of them."""

    def __init__(
        self, size: tuple[int, int, int], dtype: torch.dtype, *, norm: bool, scale: bool, keep: bool
    ) -> None:
        self.rows, channels, hidden = self.size = size
        self.dtype, vector = dtype, wide(dtype)
        self.x, self.inputs, self.grad = (surrounded(self.rows, channels, dtype) for _ in range(3))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype).to(vector)

        self.norm = [random(channels), random(channels)] if norm else [None, None]
        self.fc1_weight, self.fc1_bias = random(hidden, channels) * 0.25, random(hidden)
        self.fc2_weight, self.fc2_bias = random(channels, hidden) * 0.25, random(channels)
        self.scale = random(channels) if scale else None
        self.pixels = max(self.rows // 3, 1)
        self.keep = torch.rand(4, dtype=vector) if keep else None

    def forward(self, kept: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        out = surrounded(*self.x.shape, self.dtype, torch.nan) if out is None else out
        OPS.mlp_into(
            out, kept, self.x, self.inputs, *self.norm, EPS, self.fc1_weight, self.fc1_bias,
            self.fc2_weight, self.fc2_bias, self.scale, self.keep, self.pixels,
        )  # fmt: skip
        return out

    def backward(
        self,
        kept: Tensor | None = None,
        of_parameters: bool = True,
        grad_inputs: Tensor | None = None,
    ) -> list[Tensor]:
        """The gradients of inputs, [norm's,] fc1_weight, its bias, fc2_weight, and its bias."""
        _, channels, hidden = self.size
        vector = wide(self.dtype)
        if grad_inputs is None:
            grad_inputs = surrounded(*self.x.shape, self.dtype, torch.nan)
        of_norm = [None if v is None else torch.full_like(v, torch.nan) for v in self.norm]
        of_fc1 = torch.full((hidden, channels), torch.nan, dtype=vector)
        of_fc2 = torch.full((channels, hidden), torch.nan, dtype=vector)
        biases = [torch.full_like(b, torch.nan) for b in (self.fc1_bias, self.fc2_bias)]
        weights = (of_fc1, of_fc2) if of_parameters else (None, None)
        OPS.mlp_backward_into(
            grad_inputs, *of_norm, weights[0], biases[0], weights[1], biases[1], self.grad,
            self.inputs, kept, *self.norm, EPS, self.fc1_weight, self.fc1_bias, self.fc2_weight,
            self.scale, self.keep, self.pixels,
        )  # fmt: skip
        results = [grad_inputs, *of_norm, weights[0], biases[0], weights[1], biases[1]]
        return [t for t in results if t is not None]

    def exact(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The result, the hidden tensor before its bias, and the gradients, in float64."""
        leaves = [
            None if t is None else t.detach().double().requires_grad_()
            for t in (
                self.inputs, *self.norm, self.fc1_weight, self.fc1_bias, self.fc2_weight,
                self.fc2_bias,
            )
        ]  # fmt: skip
        inputs, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = leaves
        n = inputs
        if norm_weight is not None:
            n = F.layer_norm(inputs, norm_weight.shape, norm_weight, norm_bias, EPS)
        hidden = n @ fc1_weight.t()
        branch = F.gelu(hidden + fc1_bias) @ fc2_weight.t() + fc2_bias
        keep = torch.ones(self.rows, 1, dtype=torch.float64)
        if self.keep is not None:
            keep = self.keep.double()[torch.arange(self.rows) // self.pixels][:, None]
        scale = 1.0 if self.scale is None else self.scale.double()
        result = self.x.double() + keep * scale * branch
        gradients = torch.autograd.grad(
            keep * branch * scale, inputs, self.grad.double(), retain_graph=True
        )
        # Of parameters: those of the second layer know nothing of the scale.
        of_first = [t for t in leaves[1:5] if t is not None]
        first = torch.autograd.grad(
            keep * branch * scale, of_first, self.grad.double(), retain_graph=True
        )
        second = torch.autograd.grad(keep * branch, leaves[5:], self.grad.double())
        return result.detach(), hidden.detach(), [*gradients, *first, *second]


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("everything", [False, True], ids=["bare", "norm-scale-keep"])
def test_by_the_definition(
    isa: str, everything: bool, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """Forward and backward, with the hidden tensor kept or computed again."""
    given = dict.fromkeys(("norm", "scale", "keep"), everything)
    with kernel_sizes(**sizes):
        for size in SIZES:
            case = Case(size, dtype, **given)
            check(case, size)


def check(case: Case, size: tuple[int, int, int]) -> None:
    rows, channels, hidden = size
    result, exact_hidden, gradients = case.exact()
    kept = surrounded(rows, hidden, case.dtype, torch.nan)
    out = case.forward(kept)
    assert is_intact(out)
    assert is_intact(kept)
    assert torch.equal(case.forward(), out)
    close = tolerance(case.dtype, reduction=channels + hidden, roundings=3)
    assert relative_error(out, result) <= close
    assert relative_error(kept, exact_hidden) <= close
    for hidden_kept in (None, kept):
        found = case.backward(hidden_kept)
        assert is_intact(found[0])
        assert len(found) == len(gradients)
        limit = tolerance(case.dtype, reduction=rows + channels + hidden, roundings=6)
        if channels == 1 and case.norm[0] is not None:
            found, exact = found[1:], gradients[1:]  # LN's of one channel is a difference of equals
        else:
            exact = gradients
        for i, (got, want) in enumerate(zip(found, exact, strict=True)):
            assert relative_error(got, want) <= limit, i
        alone = case.backward(hidden_kept, of_parameters=False)
        assert torch.equal(alone[0], case.backward(hidden_kept)[0])


@pytest.mark.walks_memory
def test_inputs_may_be_overwritten(isa: str) -> None:
    """Each pixel is read before it is written."""
    case = Case((61, 24, 96), torch.float32, norm=True, scale=True, keep=True)
    with kernel_sizes(**SMALL):
        expected, gradients = case.forward(), case.backward()
        again = Case.__new__(Case)
        again.__dict__.update(case.__dict__, inputs=case.inputs.clone())
        over = again.backward(grad_inputs=again.inputs)
        assert all(torch.equal(a, b) for a, b in zip(over, gradients, strict=True))
        assert torch.equal(case.forward(out=case.inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    case = Case((1000, 24, 96), dtype, norm=True, scale=True, keep=False)
    results = []
    with kernel_sizes(mlp_parts=4, depthwise_grain=1):
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results.append([case.forward(), *case.backward()])
            finally:
                torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.walks_memory
def test_far_values(isa: str) -> None:
    """An infinite or undefined pixel stays its own, and its neighbours in a tile what they are."""
    case = Case((40, 24, 96), torch.float32, norm=True, scale=False, keep=False)
    expected = case.forward()
    case.inputs[7, 3], case.inputs[20, 5] = torch.inf, torch.nan
    found = case.forward()
    others = [i for i in range(40) if i not in (7, 20)]
    assert found[[7, 20]].isnan().all()
    assert torch.equal(found[others], expected[others])


def test_an_infinite_weight_meets_no_pixel_that_is_not_there() -> None:
    """A panel that is not full has the gradients of its pixels alone."""
    case = Case((15, 2, 1), torch.float32, norm=False, scale=False, keep=False)
    case.inputs.fill_(1)
    case.grad.fill_(1)
    case.fc1_weight.fill_(1)
    case.fc2_weight.copy_(torch.tensor([[torch.inf], [1.0]]))
    of_fc1_bias = case.backward()[2]
    assert of_fc1_bias.isposinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_pixels(dtype: torch.dtype) -> None:
    """Those of equal values, whose roundings do not cancel: as exact as the library's route."""
    channels, pixels = 8, 1 << 18
    case = Case((pixels, channels, 32), dtype, norm=True, scale=False, keep=False)
    case.grad.fill_(0.1)
    case.fc1_bias.zero_()
    gradients = case.backward()
    exact = case.exact()[2]
    for i, (got, want) in enumerate(zip(gradients[1:], exact[1:], strict=True)):
        assert relative_error(got, want) <= 2e-5, i


# ---- routes --------------------------------------------------------------------------------------


def called(function: Any) -> set[str]:
    """Names of the ops that a function calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("whole", [False, True])
def test_the_policy_chooses(whole: bool) -> None:
    block = fastfuse.nn.CEDBlock(8)
    x = torch.randn(1, 8, 20, 20, requires_grad=True)
    dtypes = frozenset([torch.float32] if whole else [])
    with kernel_sizes(mlp_parts=2), use_policy(policy_of("cpu"), whole_mlp=dtypes):
        ops = called(lambda: block(x).sum().backward())
    assert ("fastfuse::mlp_into" in ops) == whole
    assert ("fastfuse::mlp_backward_into" in ops) == whole
    assert ("fastfuse::bias_gelu_into" in ops) != whole


def test_few_pixels_have_the_librarys_gradients() -> None:
    """Which are those of the hidden tensor that the kernel kept, too."""
    block = fastfuse.nn.CEDBlock(16)
    x = torch.randn(1, 16, 9, 9, requires_grad=True)
    gradients = {}
    # as bytes of sums of parts would be too many
    many = torch.empty(1 << 20, 16)
    for limit in (1, 1 << 20):
        whole = {"whole_mlp": frozenset([torch.float32]), "whole_mlp_bytes": limit}
        with kernel_sizes(mlp_parts=2), use_policy(policy_of("cpu"), **whole) as policy:
            assert policy.backward_is_whole(many, 64) == (limit > 1)
    for pixels in (1.0, 1000.0):
        whole = {"whole_mlp": frozenset([torch.float32]), "whole_mlp_pixels": pixels}
        with kernel_sizes(mlp_parts=2), use_policy(policy_of("cpu"), **whole):
            leaves = [x, *block.parameters()]

            def step() -> None:
                gradients[pixels] = torch.autograd.grad(block(x).square().sum(), leaves)  # noqa: B023

            assert ("fastfuse::mlp_backward_into" in called(step)) == (pixels == 1.0)
    for a, b in zip(*gradients.values(), strict=True):
        assert relative_error(a, b) <= 1e-5


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.randn(61, 23), "inputs must be a matrix of 61 rows and 23 channels"),
        ("inputs", torch.randn(60, 24), "inputs must be a matrix of 61 rows"),
        ("inputs", torch.randn(61, 24).double(), "in the input's dtype"),
        ("fc1_weight", torch.randn(96, 23), r"fc1_weight must be a contiguous \(96, 24\) matrix"),
        ("fc1_weight", torch.randn(24, 96).t(), "fc1_weight must be a contiguous"),
        ("fc1_weight", torch.randn(96, 24).double(), "in the accumulation dtype"),
        ("fc1_bias", torch.randn(1, 96), "fc1_bias must be a vector"),
        ("fc1_bias", torch.randn(0), "must have channels, and fc1_weight outputs"),
        ("fc2_weight", torch.randn(96, 24), r"fc2_weight must be a contiguous \(24, 96\) matrix"),
        ("fc2_bias", torch.randn(23), "fc2_bias must be a contiguous vector of 24"),
        ("scale", torch.randn(23), "scale must be a contiguous vector of 24"),
        ("keep", torch.rand(2), "keep must have a value for every image"),
        ("norm", [torch.randn(24), None], "norm_weight and norm_bias must be both given"),
        ("norm", [torch.randn(24), torch.randn(23)], "norm_bias must be a contiguous vector"),
        ("pixels", 0, "pixels"),
    ],
)
def test_bad_input(name: str, value: Any, message: str) -> None:
    case = Case((61, 24, 96), torch.float32, norm=True, scale=True, keep=True)
    setattr(case, name, value)
    with pytest.raises(RuntimeError, match=f"mlp_into: .*{message}"):
        case.forward()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.randn(61, 95), "kept must be a matrix of 61 rows and 96 channels"),
        (torch.randn(60, 96), "kept must be a matrix of 61 rows"),
        (torch.randn(61, 96).half(), "in the input's dtype"),
        (torch.randn(96, 61).t(), "kept must"),
    ],
)
def test_bad_hidden_tensors(kept: Tensor, message: str) -> None:
    case = Case((61, 24, 96), torch.float32, norm=True, scale=True, keep=True)
    for call in (case.forward, case.backward):
        with pytest.raises(RuntimeError, match=message):
            call(kept)
