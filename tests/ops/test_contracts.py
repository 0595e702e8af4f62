"""What every op owes PyTorch's machinery, of the ops' own samples; a new op is held to it by being
declared. What an op owes beside stands in its own tests."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from inputs import ISAS, both_layouts, every_dtype, slowly
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastfuse
from fastfuse.backends import BackendError, backend, backend_refusals
from fastfuse.ops import OPERATIONS
from fastfuse.ops.define import Sample
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance
from fastfuse.verify import check_sample, gradcheck

each_op = pytest.mark.parametrize("op", OPERATIONS)
each_differentiable_op = pytest.mark.parametrize(
    "op", [name for name, operation in OPERATIONS.items() if operation.differentiable]
)
# Of which samples call with the images alone, and no other tensor.
each_op_of_images = pytest.mark.parametrize(
    "op",
    [name for name in OPERATIONS if not name.endswith(("ced_block", "argmax", "cross_entropy"))],
)


@pytest.fixture(autouse=True)
def _kernels_of_little_work() -> Iterator[None]:
    with use_policy(policy_of("cpu"), little_macs=0):
        yield


def samples(
    op: str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    *,
    device: str = "cpu",
    small: bool = True,
) -> list[Sample]:
    options = {"device": device, "dtype": dtype, "channels_last": channels_last, "small": small}
    return list(OPERATIONS[op].samples(**options))


def leaves_of(sample: Sample) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(sample.differentiable) for t in sample.inputs]


def gradients(output: Tensor, inputs: Sequence[Tensor], **options: Any) -> Sequence[Tensor]:
    """Of the output, if it has any."""
    if not output.requires_grad:
        return []
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    cotangent = cotangent.reshape(output.shape)
    return torch.autograd.grad(output, inputs, cotangent, **options)


class Calls(TorchDispatchMode):
    """Records the calls of this package's ops that are not within another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfuse":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def again(value: Any, wanted: bool) -> Any:
    """An argument of a call, as one of another."""
    if isinstance(value, (list, tuple)):
        return [again(v, wanted) for v in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(wanted and value.requires_grad)


@pytest.mark.walks_memory
@each_op
@both_layouts
@every_dtype
def test_equals_the_definition(op: str, isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Outputs and gradients of the CPU kernels, on every instruction set."""
    with backend("cpu"):
        for is_small in (True, False):
            for sample in samples(op, dtype, channels_last, small=is_small):
                if sample.name != "several chunks" or isa == ISAS[-1]:  # mostly matrix products
                    check_sample(sample)


@each_op
@both_layouts
def test_opcheck(op: str, channels_last: bool) -> None:
    """Of the op and of its backward, with every combination of arguments that samples have."""
    seen = set()
    for sample in samples(op, channels_last=channels_last):
        leaves = leaves_of(sample)
        with backend("cpu"), Calls() as calls:
            output = sample.call(*leaves)
            gradients(output, leaves, create_graph=OPERATIONS[op].twice_differentiable)
        assert any(func._opname.startswith(op) for func, _ in calls.found)
        for func, args in calls.found:
            absent = tuple(i for i, value in enumerate(args) if value is None)
            flags = tuple(value for value in args if isinstance(value, bool))
            if (func, absent, flags) not in seen:
                seen.add((func, absent, flags))
                wanted = OPERATIONS[op].twice_differentiable or "_backward" not in func._opname
                torch.library.opcheck(func, tuple(again(value, wanted) for value in args))
    assert len({func for func, *_ in seen}) >= 2


@each_op
@pytest.mark.parametrize(
    ("name", "dynamic"), [("cpu", False), ("cpu", True), slowly("reference", False)]
)
def test_compile(op: str, name: str, dynamic: bool) -> None:
    """One graph, forward and backward, with the strides of eager mode."""
    torch._dynamo.reset()
    sample = samples(op, channels_last=dynamic)[0]

    def step(*inputs: Tensor) -> Tensor:
        return sample.call(*inputs).relu() * 2

    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=record)
    results = []
    with backend(name):
        for function in (step, compiled):
            leaves = leaves_of(sample)
            output = function(*leaves)
            results.append([output, *gradients(output, leaves)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)
        assert graph.stride() == eager.stride() or name == "reference"
    assert (f"fastfuse.{op}" in graphs[0]) == (name == "cpu")
    with backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(*leaves)


@each_op
def test_compile_with_a_backend_inside(op: str) -> None:
    torch._dynamo.reset()
    sample = samples(op)[0]

    def step(*inputs: Tensor) -> Tensor:
        with backend("cpu"):
            return sample.call(*inputs)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*sample.inputs), step(*sample.inputs))


class Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


@each_op
def test_export(op: str) -> None:
    sample = samples(op)[0]
    module = Module(sample.call)
    program = torch.export.export(module, sample.inputs)
    assert any(f"fastfuse.{op}" in str(node.target) for node in program.graph.nodes)
    with backend("cpu"):
        expected = module(*sample.inputs)
    torch.testing.assert_close(program.module()(*sample.inputs), expected)


@each_op_of_images
@both_layouts
def test_meta_and_fake(op: str, channels_last: bool) -> None:
    """Shapes, dtypes and memory formats with no values; backward too."""
    for sample in samples(op, channels_last=channels_last):
        leaves = leaves_of(sample)
        with backend("cpu"):
            output = sample.call(*leaves)
        expected = [output, *gradients(output, leaves)]
        assert sample.call(*(t.to("meta") for t in sample.inputs)).shape == output.shape
        with FakeTensorMode() as mode, backend("cpu"):
            leaves = [mode.from_tensor(t).requires_grad_() for t in sample.inputs]
            output = sample.call(*leaves)
            found = [output, *torch.autograd.grad(output.sum(), leaves)]
        for fake, real in zip(found, expected, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert found[0].stride() == expected[0].stride()


@each_op
def test_autocast(op: str, any_backend: str) -> None:
    """Images and parameters in its dtype, whichever have it already, but for the vectors of ops
    that leave these alone; float64 stays. Gradients have the dtype of what they are of."""
    for sample in samples(op):
        keeps = OPERATIONS[op].keeps_vectors
        leaves = leaves_of(sample)
        narrow = [t if keeps and t.dim() == 1 else t.bfloat16() for t in sample.inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = sample.call(*leaves)
            mixed = [
                sample.call(*sample.inputs[:i], narrow[i], *sample.inputs[i + 1 :])
                for i in range(len(narrow))
            ]
            all_narrow = sample.call(*(t.bfloat16() for t in sample.inputs))
            double = sample.call(*(t.double() for t in sample.inputs))
        assert double.dtype == torch.float64
        if not OPERATIONS[op].autocasts:
            assert torch.equal(output, sample.call(*leaves))
            continue
        expected = sample.call(*narrow)
        assert output.dtype == expected.dtype == torch.bfloat16
        assert all(torch.equal(found, expected) for found in (output, *mixed))
        assert torch.equal(all_narrow, sample.call(*(t.bfloat16() for t in sample.inputs)))
        for leaf, gradient in zip(leaves, gradients(output, leaves), strict=True):
            assert gradient.dtype == leaf.dtype


@each_differentiable_op
def test_backward_of_float32_under_autocast(op: str) -> None:
    leaves = leaves_of(samples(op)[0])
    output = samples(op)[0].call(*leaves)
    expected = gradients(output, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(output, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_differentiable_op
def test_torch_func_transforms(op: str) -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    sample = samples(op, torch.float64)[0]
    first, *others = sample.inputs

    def loss(x: Tensor) -> Tensor:
        return sample.call(x, *others).square().sum()

    leaf = first.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(first), expected)
    mapped = torch.vmap(lambda x: sample.call(x, *others))(torch.stack([first, 2 * first]))
    torch.testing.assert_close(mapped[1], sample.call(2 * first, *others))
    with backend("cpu"), pytest.raises(BackendError, match=rf"{op}: .*inside a torch.func trans"):
        torch.func.grad(loss)(first)


@each_differentiable_op
def test_forward_mode_runs_on_the_reference(op: str) -> None:
    """Fused kernels have no forward-mode formula; a tangent must never vanish silently."""
    sample = samples(op, torch.float64)[0]
    first, *others = sample.inputs
    tangent = torch.randn_like(first)
    with forward_ad.dual_level():
        output = sample.call(forward_ad.make_dual(first, tangent), *others)
        found = forward_ad.unpack_dual(output).tangent
        with backend("cpu"), pytest.raises(BackendError, match="forward-mode differentiation"):
            sample.call(*sample.inputs)
    step = 1e-6
    ahead, behind = (sample.call(first + s * tangent, *others) for s in (step, -step))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@each_differentiable_op
def test_batched_gradients(op: str) -> None:
    """The same as one by one, or an error that says what to do."""
    sample = samples(op, torch.float64)[0]
    leaves = leaves_of(sample)
    output = sample.call(*leaves)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)

    def batched_gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(output, leaves, cotangents, True, is_grads_batched=True)

    if op not in ("depthwise_conv2d", "upsample_cross_entropy"):  # which run one by one
        refused = rf"^{op}(_\w+)?: backward expects plain gradients, got batched ones"
        with pytest.raises(RuntimeError, match=refused):
            batched_gradients()
        return
    batched = batched_gradients()
    for i, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        for mine, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(mine[i], expected)


@each_op
@both_layouts
def test_inference_mode(op: str, channels_last: bool) -> None:
    for sample in samples(op, channels_last=channels_last):
        expected = sample.call(*leaves_of(sample))
        with torch.inference_mode():
            assert torch.equal(sample.call(*sample.inputs), expected)


@each_differentiable_op
def test_checkpointing(op: str) -> None:
    sample = samples(op)[0]
    leaves = leaves_of(sample)
    expected = gradients(sample.call(*leaves), leaves)
    output = torch.utils.checkpoint.checkpoint(sample.call, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(output, leaves), expected, strict=True))


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: [t],
    "another rank": lambda t: t[None],
    "integers": lambda t: t.int(),
    "a sparse tensor": lambda t: t.to_sparse(),
    "another dtype": lambda t: t.double(),
    "another device": lambda t: t.to("meta"),
}


@each_op
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors(op: str, any_backend: str, wrong: str) -> None:
    """In the place of any input: the error names op, argument, what was expected and what came."""
    expected = rf"^{op}: (\w+)(\[\d+\])? must .*; (got|features)"
    named = set()
    for sample in samples(op):
        if len(sample.inputs) == 1 and wrong.startswith("another d"):  # right, of a single input
            continue
        for i, value in enumerate(sample.inputs):
            inputs = [*sample.inputs[:i], WRONG[wrong](value), *sample.inputs[i + 1 :]]
            with pytest.raises((TypeError, ValueError), match=expected) as raised:
                sample.call(*inputs)
            named.add(re.match(expected, str(raised.value))[1])  # type: ignore[index]
    assert named <= set(inspect.signature(getattr(fastfuse, op)).parameters)


@each_op
def test_a_list_under_autocast(op: str) -> None:
    """Checks come before casts."""
    sample = samples(op)[0]
    for i, value in enumerate(sample.inputs):
        inputs = [*sample.inputs[:i], [value], *sample.inputs[i + 1 :]]
        expected = pytest.raises(TypeError, match=rf"^{op}: .* must be a tensor; got list")
        with torch.autocast("cpu", dtype=torch.bfloat16), expected:
            sample.call(*inputs)


@each_op
def test_a_backend_that_cannot_run(op: str) -> None:
    sample = samples(op)[0]
    with backend("triton"), pytest.raises(BackendError, match=f"^{op}: .*expected CUDA tensors"):
        sample.call(*sample.inputs)


@each_op
def test_the_function_is_public(op: str) -> None:
    function = getattr(fastfuse, op)
    assert op in fastfuse.__all__
    for section in ("Args:", "Returns:", "Raises:", ">>> "):
        assert section in function.__doc__, section


# ---- on every device ----------------------------------------------------------------------------

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@contextlib.contextmanager
def kernels_of(device: str, gpu_backend: str = "triton") -> Iterator[None]:
    """Without TF32, to which PyTorch's float32 convolutions may round their inputs."""
    usual, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    with backend(gpu_backend if device == "cuda" else "cpu"):
        yield
    torch.backends.cudnn.allow_tf32 = usual


@pytest.mark.gpu
@each_op
@both_layouts
@every_dtype
@pytest.mark.parametrize("which", ["cuda", "triton"])
def test_equals_the_definition_on_gpus(
    op: str, dtype: torch.dtype, channels_last: bool, which: str
) -> None:
    probe = torch.empty(0, dtype=dtype, device="cuda")
    refusal = backend_refusals(OPERATIONS[op], probe).get(which, "no such kernel")
    if which == "cuda" and refusal is not None:
        pytest.skip(refusal)
    with kernels_of("cuda", which):
        for is_small in (True, False):
            for sample in samples(op, dtype, channels_last, device="cuda", small=is_small):
                check_sample(sample)


@devices
@each_differentiable_op
@both_layouts
def test_gradcheck(op: str, channels_last: bool, device: str) -> None:
    """On CPUs every derivative by itself, on GPUs a random sum of them."""
    with kernels_of(device):
        for sample in samples(op, torch.float64, channels_last, device=device):
            gradcheck(sample, twice=OPERATIONS[op].twice_differentiable)
            if device == "cpu":
                assert torch.autograd.gradcheck(sample.call, leaves_of(sample))


@devices
@each_differentiable_op
def test_backward_runs_on_forwards_backend(op: str, device: str) -> None:
    run = []
    for sample in samples(op, device=device):
        leaves = leaves_of(sample)
        with kernels_of(device):
            output = sample.call(*leaves)
            expected = gradients(output, leaves, retain_graph=True)
        with backend("reference"), Calls() as calls:
            found = gradients(output, leaves)
        run.append(bool(calls.found) or sample.name.startswith("the same size"))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(run)


@devices
@each_op
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(
    op: str, dtype: torch.dtype, channels_last: bool, device: str
) -> None:
    with kernels_of(device):
        for sample in samples(op, dtype, channels_last, device=device, small=device == "cpu"):
            runs = []
            for _ in range(3):
                leaves = leaves_of(sample)
                output = sample.call(*leaves)
                runs.append([output, *gradients(output, leaves)])
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def spread(tensor: Tensor, channels_last: bool) -> Tensor:
    """The same values with others between them: of images other channels, or in both directions."""
    others = torch.full_like(tensor, torch.nan)
    if tensor.dim() == 4 and channels_last:
        wider = torch.cat([others, tensor, others], 1)
        return wider.contiguous(memory_format=torch.channels_last).chunk(3, 1)[1]
    if tensor.dim() >= 2:
        return torch.stack([tensor.mT, others.mT], -1)[..., 0].mT
    return torch.stack([tensor, others], -1)[..., 0]


@devices
@each_op
@both_layouts
@every_dtype
def test_any_strides(op: str, dtype: torch.dtype, channels_last: bool, device: str) -> None:
    """Of inputs and of what comes back through the output."""
    with kernels_of(device):
        for sample in samples(op, dtype, channels_last, device=device):
            inputs = tuple(spread(t, channels_last) for t in sample.inputs)
            check_sample(dataclasses.replace(sample, inputs=inputs))
            leaves = leaves_of(sample)
            output = sample.call(*leaves)
            if output.requires_grad:
                cotangent = torch.randn_like(output)
                dense = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
                found = torch.autograd.grad(output, leaves, spread(cotangent, channels_last))
                for a, b in zip(found, dense, strict=True):
                    limit = tolerance(dtype, reduction=output.numel() / output.shape[1])
                    assert relative_error(a, b) <= 2 * limit


@pytest.mark.gpu
@each_op
def test_compiled_and_in_a_cuda_graph(op: str) -> None:
    torch._dynamo.reset()
    sample = samples(op, torch.bfloat16, True, device="cuda", small=False)[0]
    expected = sample.call(*sample.inputs)
    compiled = torch.compile(sample.call, fullgraph=True)
    torch.testing.assert_close(compiled(*sample.inputs), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample.call(*sample.inputs)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
