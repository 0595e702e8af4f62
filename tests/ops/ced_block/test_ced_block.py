"""ced_block and lr_ced_block: values, inputs, derivatives, memory, determinism."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from blocks import BLOCKS, Block, both_blocks, with_gradients
from inputs import alternating, both_layouts, images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend
from fastfuse.ops.layout import as_matrix, to_memory_format
from fastfuse.ops.pointwise import mlp
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

both_ways = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])


def matrix_of(image: Tensor) -> Tensor:
    return as_matrix(to_memory_format(image, True))


def close(results: Sequence[Tensor], expected: Sequence[Tensor], tol: float) -> None:
    for i, (result, exact) in enumerate(zip(results, expected, strict=True)):
        assert relative_error(result, exact) <= tol, i


# ---- values -------------------------------------------------------------------------------------


KEEP = [0.0, 0.25, 1.5, 0.0, 2.0]


@pytest.mark.walks_memory
@both_blocks
@both_ways
@pytest.mark.parametrize("rows", [1, 5, 12, 29, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_of_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, recompute: bool, block: Block
) -> None:
    """Chunks that are parts of an image, an image, or several; each image with its own factor.
    Products are the library's."""
    monkeypatch.setattr(mlp, "ROW_MULTIPLE", 1)
    policy = policy_of("cpu")
    chunk = rows * 32 * policy.product_dtype(dtype).itemsize
    (x, *parameters), (cotangent,) = block.inputs((5, 8, 3, 4)), images((5, 8, 3, 4))
    inputs = [t.to(dtype) for t in (x, *parameters)]
    cotangent, keep = cotangent.to(dtype), torch.tensor(KEEP)
    library = {"hidden_bytes": chunk, "hidden_rows": 1, "whole_mlp": frozenset()}
    with backend("cpu"), use_policy(policy, **library):
        assert len(list(mlp.Chunks(matrix_of(inputs[0]), 32))) == math.ceil(60 / rows)
        results = with_gradients(block.call, inputs, cotangent, keep=keep, recompute=recompute)
    expected = with_gradients(
        block.reference, [t.double() for t in inputs], cotangent.double(), keep=keep.double()
    )
    close(results, expected, tolerance(dtype, reduction=60, roundings=3))


@both_blocks
@both_ways
def test_a_branch_that_is_dropped_is_the_identity(recompute: bool, block: Block) -> None:
    inputs, (cotangent,) = block.inputs(), images((2, 8, 5, 6))
    for keep in (torch.zeros(2), torch.tensor([0.0, 1.0])):
        output, grad_x, *others = with_gradients(
            block.call, inputs, cotangent, keep=keep, recompute=recompute
        )
        assert torch.equal(output[0], inputs[0][0])
        assert torch.equal(grad_x[0], cotangent[0])
        assert all(bool(g.any()) == bool(keep.any()) for g in others)


@both_blocks
def test_factors_of_one_change_nothing(block: Block) -> None:
    *inputs, _ = block.inputs()
    plain = block.call(*inputs)
    for extra in ((torch.ones(8),), (None, torch.ones(2)), (torch.ones(8), torch.ones(2))):
        assert torch.equal(block.call(*inputs, *extra), plain)


@both_blocks
@pytest.mark.parametrize("keep_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keep_of_any_dtype(
    any_backend: str, dtype: torch.dtype, keep_dtype: torch.dtype, block: Block
) -> None:
    """As bernoulli_ draws it, in float32 or in x's dtype."""
    inputs, keep = block.inputs(dtype=dtype), torch.tensor([0.0, 1.25], dtype=keep_dtype)
    result = block.call(*inputs, keep)
    assert result.dtype == dtype
    assert torch.equal(result, block.call(*inputs, keep.to(dtype)))


@pytest.mark.walks_memory
@both_blocks
@pytest.mark.parametrize("hidden", [1, 7, 100])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_other_kernels_and_widths(any_backend: str, k: int, hidden: int, block: Block) -> None:
    """k x k, dilations beyond the image, a hidden width that is no multiple, an eps that counts."""
    inputs = block.inputs((2, 5, 4, 6), hidden, dtype=torch.float64)
    for i, name in enumerate(block.parameters, 1):
        if name.startswith("dw") and name.endswith("weight"):
            inputs[i] = torch.randn(5, 1, k, k).double() / k
            k = (k + 2) % 10  # the second convolution's
    (cotangent,) = images((2, 5, 4, 6), dtype=torch.float64)
    for dilation in (1, 2, 7)[: 1 if block.steps == 1 else 3]:
        options = {"eps": 0.25, **({} if block.steps == 1 else {"dilation": dilation})}
        results = with_gradients(block.call, inputs, cotangent, **options)
        expected = with_gradients(block.reference, inputs, cotangent, **options)
        close(results, expected, 1e-12)
        if any_backend == "cpu":
            other = block.call(*inputs, **{**options, "eps": 1e-6})
            assert relative_error(results[0], other) > 1e-3


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_blocks
@both_layouts
def test_any_strides(channels_last: bool, block: Block) -> None:
    """Sliced, transposed, expanded and offset images equal their dense copies."""
    (x,) = images((4, 17, 12, 16), channels_last=channels_last)
    keep = torch.tensor([0.5, 9.0, 2.0, 9.0])[::2]
    for name, image in {
        "sliced": x[::2, 3:11, 4:9, 1::2],
        "channel step": x[:2, 1::2],
        "transposed": x[:2, :8].transpose(2, 3),
        "expanded channels": x[:2, :1].expand(-1, 8, -1, -1),
        "expanded pixels": x[:2, :8, :1, :1].expand(-1, -1, 5, 6),
        "expanded batch": x[:1, :8].expand(2, -1, -1, -1),
    }.items():
        _, *parameters = block.inputs()
        dense = block.call(image.contiguous(), *parameters, keep.clone())
        with backend("cpu"):
            result = block.call(image, *parameters, keep)
        assert relative_error(result, dense) <= tolerance(torch.float32, roundings=4), name


def spread(t: Tensor) -> Tensor:
    """The same values at other strides."""
    if t.dim() == 1:
        return torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0]
    if t.dim() == 2:
        return t.t().contiguous().t()
    return torch.cat([torch.full_like(t, torch.nan), t.mT], 1)[:, 1:].mT


@pytest.mark.walks_memory
@both_blocks
@both_ways
def test_parameters_of_any_strides(recompute: bool, block: Block) -> None:
    inputs, (cotangent,) = block.inputs(dtype=torch.float64), images((2, 8, 5, 6))
    x, *parameters = inputs
    scattered = [x, *map(spread, parameters)]
    assert not any(t.is_contiguous() for t in scattered[1:])
    cotangent, keep = cotangent.double(), spread(torch.tensor([0.5, 2.0]))
    results, expected = (
        with_gradients(block.call, tensors, cotangent, keep=keep, recompute=recompute)
        for tensors in (scattered, inputs)
    )
    close(results, expected, 1e-12)
    expanded = [t[:1].expand_as(t) for t in inputs]
    dense = [t.contiguous() for t in expanded]
    results, expected = (
        with_gradients(block.call, tensors, cotangent, recompute=recompute)
        for tensors in (expanded, dense)
    )
    close(results, expected, 1e-12)


@pytest.mark.walks_memory
@both_blocks
@both_layouts
@both_ways
def test_gradients_of_any_strides(recompute: bool, channels_last: bool, block: Block) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    inputs = block.inputs((2, 8, 6, 8), dtype=torch.float64, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in inputs]
    output = block.call(*leaves, recompute=recompute)
    dense, larger = torch.randn(2, 8, 6, 8).double(), torch.randn(2, 9, 6, 16).double()
    for cotangent in (
        torch.ones((), dtype=torch.float64).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        larger[:, 1:, :, ::2],
        larger.contiguous(memory_format=torch.channels_last)[:, 1:, :, 8:],
    ):
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        plain = cotangent.clone(memory_format=torch.contiguous_format)
        expected = torch.autograd.grad(output, leaves, plain, retain_graph=True)
        close(gradients, expected, 1e-12)


@both_blocks
@both_ways
def test_memory_format_is_the_inputs(any_backend: str, recompute: bool, block: Block) -> None:
    for image, expected in (
        (torch.randn(2, 8, 5, 6), torch.contiguous_format),
        (images((2, 8, 5, 6), channels_last=True)[0], torch.channels_last),
        (images((2, 9, 5, 6), channels_last=True)[0][:, 1:, 1:, 2:], torch.channels_last),
        (torch.randn(2, 8, 1, 1), torch.contiguous_format),
    ):
        _, *parameters = block.inputs()
        leaf = image.detach().requires_grad_()
        output = block.call(leaf, *parameters, recompute=recompute)
        assert output.is_contiguous(memory_format=expected)
        (gradient,) = torch.autograd.grad(output, leaf, torch.randn_like(output))
        if any_backend == "cpu":
            assert gradient.is_contiguous(memory_format=expected)


@pytest.mark.walks_memory
@both_blocks
@both_layouts
@both_ways
def test_every_value_is_written(
    isa: str, recompute: bool, channels_last: bool, block: Block
) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for scaled, keep in ((True, torch.tensor([0.0, 1.5])), (False, None)):
            inputs = block.inputs((2, 19, 6, 7), 21, channels_last=channels_last, scaled=scaled)
            results = with_gradients(
                block.call, inputs, torch.randn(2, 19, 6, 7), keep=keep, recompute=recompute
            )
            assert not any(t.isnan().any() for t in results)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@both_blocks
@both_layouts
@both_ways
def test_no_image_is_empty(
    any_backend: str, recompute: bool, channels_last: bool, block: Block
) -> None:
    inputs = block.inputs((0, 8, 5, 6), channels_last=channels_last)
    output, *gradients = with_gradients(
        block.call, inputs, torch.randn(0, 8, 5, 6), keep=torch.ones(0), recompute=recompute
    )
    assert output.shape == (0, 8, 5, 6)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


# ---- derivatives --------------------------------------------------------------------------------


@both_blocks
@both_layouts
@both_ways
@backend("cpu")
def test_gradcheck(recompute: bool, channels_last: bool, block: Block) -> None:
    for sample in block.samples(
        device="cpu", dtype=torch.float64, channels_last=channels_last, small=True
    ):
        inputs = tuple(x.requires_grad_() for x in sample.inputs)

        def call(*tensors: Tensor, sample=sample) -> Tensor:
            return sample.call(*tensors, recompute=recompute)

        assert torch.autograd.gradcheck(call, inputs, fast_mode=recompute)


@both_blocks
def test_second_derivatives_are_the_references(block: Block) -> None:
    """The fused block says so, whatever is asked for."""
    leaves = [t.requires_grad_() for t in block.inputs((1, 3, 2, 3), 4, dtype=torch.float64)]
    for recompute in (True, False):
        for wanted in (leaves[:1], leaves[1:2], leaves[-3:], leaves):
            output = block.call(*leaves, recompute=recompute)
            first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
            message = rf"{block.name}: expected first derivatives.*fastfuse.backend\('reference'\)"
            with pytest.raises(NotImplementedError, match=message):
                torch.autograd.grad(sum(g.sum() for g in first), leaves)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(block.call, leaves, fast_mode=True)


def some(block: Block) -> dict[str, list[int]]:
    """Inputs by name, the image being 0."""
    count = len(block.parameters)
    return {
        "image": [0],
        "parameters": list(range(1, count + 1)),
        "depthwise weight": [1],
        "norms": [i for i, n in enumerate(block.parameters, 1) if n.startswith("norm")],
        "all but the first norm": [i for i in range(count + 1) if i not in (3, 4)],
        "scale": [count],
        "image and fc2": [0, count - 2, count - 1],
        "nothing": [],
    }


@both_blocks
@both_ways
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_frozen_inputs(scaled: bool, recompute: bool, block: Block) -> None:
    """Gradients with some inputs frozen equal those of all."""
    inputs, cotangent = block.inputs(scaled=scaled), torch.randn(2, 8, 5, 6)
    keep = torch.tensor([0.5, 2.0]) if scaled else None
    options = {"keep": keep, "recompute": recompute}
    _, *everything = with_gradients(block.call, inputs, cotangent, **options)
    for name, wanted in some(block).items():
        wanted = [i for i in wanted if i < len(inputs)]
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        output = block.call(*tensors, **options)
        assert output.requires_grad == bool(wanted)
        if wanted:
            gradients = torch.autograd.grad(output, [tensors[i] for i in wanted], cotangent)
            close(gradients, [everything[i] for i in wanted], tolerance(torch.float32))
        with torch.no_grad():
            assert not block.call(*tensors, **options).requires_grad, name


@both_blocks
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_destroys_nothing(dtype: torch.dtype, recompute: bool, block: Block) -> None:
    """Twice backward gives the same gradients; inputs and gradients stay as they were."""
    inputs = block.inputs(dtype=dtype, channels_last=True)
    (cotangent,) = images((2, 8, 5, 6), dtype=dtype, channels_last=True)
    before = [t.clone() for t in (*inputs, cotangent)]
    leaves = [t.requires_grad_() for t in inputs]
    for keep in (None, torch.tensor([0.5, 2.0])):
        output = block.call(*leaves, keep=keep, recompute=recompute)
        first, second = (
            torch.autograd.grad(output, leaves, cotangent, retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip((*leaves, cotangent), before, strict=True))


# ---- memory -------------------------------------------------------------------------------------


def kept_bytes(block: Block, leaves: Sequence[Tensor], **options: bool) -> int:
    """Bytes that are kept for backward, parameters aside."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = block.call(*leaves, **options)
    assert output.requires_grad
    parameters = {t.untyped_storage().data_ptr() for t in leaves[1:]}
    return sum(n for address, n in storages.items() if address not in parameters)


@both_blocks
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_backward(dtype: torch.dtype, channels_last: bool, block: Block) -> None:
    """x alone if the rest is recomputed; else the tensors the docstring says; eager keeps more."""
    inputs = block.inputs((2, 16, 12, 14), 64, dtype=dtype, channels_last=channels_last)
    leaves, image = [t.requires_grad_() for t in inputs], inputs[0].nbytes
    with backend("reference"):
        eager = kept_bytes(block, leaves)
    with backend("cpu"):
        assert kept_bytes(block, leaves) == image <= eager / 5
        assert kept_bytes(block, leaves, recompute=False) == (6 if block.steps == 1 else 9) * image


@both_blocks
def test_little_is_kept_unasked(block: Block) -> None:
    """Where it is no more than the parameters and their gradients; results are the same."""
    leaves = [t.requires_grad_() for t in block.inputs((1, 32, 6, 7), 128)]
    x, *parameters = leaves
    image, of_parameters = x.nbytes, sum(p.nbytes for p in parameters)
    more = (5 if block.steps == 1 else 8) * image
    assert more <= 2 * of_parameters
    with backend("cpu"):
        assert kept_bytes(block, leaves) == image + more
        wide = [t.requires_grad_() for t in block.inputs((1, 32, 60, 70), 128)]
        assert kept_bytes(block, wide) == wide[0].nbytes


@both_blocks
def test_a_changed_input_is_noticed(block: Block) -> None:
    """x is kept for backward: PyTorch refuses to go back through what was overwritten."""
    x, *parameters = block.inputs()
    output = block.call(x, *[t.requires_grad_() for t in parameters])
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_blocks
@both_ways
@pytest.mark.parametrize("whole", [False, True], ids=["library", "whole"])
@pytest.mark.parametrize(
    ("dtype", "channels_last"), alternating([torch.float32, torch.bfloat16], [False, True])
)
def test_same_bits_from_run_to_run(
    dtype: torch.dtype, whole: bool, recompute: bool, channels_last: bool, block: Block
) -> None:
    """Several chunks, several threads."""
    shape, hidden = (2, 40, 29, 31), 160
    inputs = block.inputs(shape, hidden, dtype=dtype, channels_last=channels_last)
    (cotangent,) = images(shape, dtype=dtype, channels_last=channels_last)
    torch.set_num_threads(2)
    policy = {"hidden_bytes": 128 * hidden * 8, "hidden_rows": 128}
    with use_policy(policy_of("cpu"), whole_mlp=frozenset([dtype] if whole else []), **policy):
        assert len(list(mlp.Chunks(matrix_of(inputs[0]), hidden))) > 1
        results = [
            with_gradients(block.call, inputs, cotangent, recompute=recompute) for _ in range(3)
        ]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


# ---- machinery ----------------------------------------------------------------------------------


@both_blocks
@both_layouts
@both_ways
def test_autocast(any_backend: str, recompute: bool, channels_last: bool, block: Block) -> None:
    """float32 in, bfloat16 out, gradients in float32; with values of bfloat16's accuracy."""
    inputs = block.inputs(channels_last=channels_last)
    (cotangent,) = images((2, 8, 5, 6), dtype=torch.bfloat16)
    keep = torch.tensor([0.5, 2.0])

    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block.call(*tensors, keep, recompute=recompute)

    results = with_gradients(call, inputs, cotangent)
    assert results[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in results[1:])
    doubles = [(t.bfloat16() if t.dim() > 1 else t).double() for t in inputs]
    expected = with_gradients(block.reference, doubles, cotangent.double(), keep=keep.double())
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= tolerance(torch.bfloat16, reduction=60, roundings=4)


@both_blocks
@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_vectors(dtype: torch.dtype, recompute: bool, block: Block) -> None:
    """Beside narrow images, autocast or not: they are read as they are, and so are gradients."""
    wide = block.inputs()
    inputs = [t.to(dtype) if t.dim() > 1 else t for t in wide]
    (cotangent,) = images((2, 8, 5, 6), dtype=dtype)
    keep = torch.tensor([0.5, 2.0])

    def call(*tensors: Tensor) -> Tensor:
        return block.call(*tensors, keep, recompute=recompute)

    def under_autocast(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return call(*tensors)

    results = with_gradients(call, inputs, cotangent)
    again = with_gradients(under_autocast, inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))
    assert [g.dtype for g in results[1:]] == [t.dtype for t in inputs]
    doubles = [t.double() for t in inputs]
    expected = with_gradients(block.reference, doubles, cotangent.double(), keep=keep.double())
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= tolerance(dtype, reduction=60, roundings=4)


@both_blocks
@both_ways
def test_flop_formula(recompute: bool, block: Block) -> None:
    """Products and convolutions, twice as much backward, recomputation aside: as in PyTorch."""
    inputs = block.inputs((2, 8, 5, 6), 32)
    once = 2 * 5 * 6 * (2 * 2 * 8 * 32 + block.steps * 2 * 49 * 8)
    with FlopCounterMode(display=False) as counter:
        block.call(*inputs, recompute=recompute)
    assert counter.get_total_flops() == once
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        block.call(*leaves, recompute=recompute).sum().backward()
    assert counter.get_total_flops() == 3 * once


def test_flops_are_the_references() -> None:
    """CEDNet-B's largest block, without computing it."""

    def flops(name: str) -> int:
        block = BLOCKS["ced_block"]
        shapes = [t.shape for t in block.inputs((1, 128, 1, 1), 512)][1:]
        with backend(name), FakeTensorMode(), FlopCounterMode(display=False) as counter:
            block.call(torch.empty(1, 128, 64, 64), *[torch.empty(s) for s in shapes])
        return counter.get_total_flops()

    assert flops("cpu") == flops("reference")


@both_blocks
@both_ways
def test_meta_and_fake(recompute: bool, block: Block) -> None:
    on_meta = block.call(*[t.to("meta") for t in block.inputs()])
    assert on_meta.shape == (2, 8, 5, 6)
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in block.inputs(channels_last=True)]
        with backend("cpu"):
            output = block.call(*leaves, recompute=recompute)
        output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
