"""The one way to define an op: ``fastfuse::name`` with a kernel for each backend.

A definition says what PyTorch has to know, data first: the schema, kernels by backend, shapes
(``fake``), derivative, FLOPs. A backend is an overload, ``fastfuse::name`` for the first of a
device and ``fastfuse::name.backend`` for others, so that a graph names what runs, and backward
runs where forward did.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastfuse import _extension  # noqa: F401  (its kernels register themselves when it loads)
from fastfuse.backends import DISPATCH_KEYS
from fastfuse.ops.autocast import without_autocast

__all__ = [
    "COMPILED",
    "Derivative",
    "Op",
    "Operation",
    "Sample",
    "below_autograd",
    "kernels_of",
    "no_second_derivative",
    "steps_of",
]

_LIBRARY = torch.library.Library("fastfuse", "FRAGMENT")

# A kernel of the compiled module, which registers it itself.
COMPILED = "compiled"
# A function, or "module:function", imported when it is first called.
Kernel = Callable[..., Any] | str

# PyTorch's autograd of custom ops is a Python function, and costs a call about 10 us even if
# nothing is recorded. Where it is known that nothing is, this goes past it, as that function itself
# does. The name is private to PyTorch: without it calls take the longer way.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


# By kind of device, the kernels that are functions of Python, by the names of their overloads.
_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {"cpu": {}, "cuda": {}}
# By backend of GPUs, the kernels by the names of their ops, as steps of others; and which backend a
# kernel runs on that is made of such steps.
_STEPS = {"cuda": SimpleNamespace(), "triton": SimpleNamespace()}
_backend_of_steps = ContextVar("backend of steps", default="triton")

# What the dispatcher adds to the keys of every call, in inference mode and else: nothing more while
# there is no mode of Python's, no transform, and no batched gradient.
_INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_ORDINARY = _INFERENCE.add(torch._C.DispatchKey.ADInplaceOrView)
# What a kernel may be given as it is: others, such as numpy's ints, the dispatcher converts.
_TENSORS = (Tensor, torch.nn.Parameter)
_NUMBERS = (int, bool, float, NoneType)


def _nothing_to_dispatch(arguments: Iterable[Any]) -> bool:
    """Whether nothing is to see or to change a call of these arguments: no mode, no transform, no
    profiler, no class of tensors but PyTorch's own."""
    return (
        torch._C._dispatch_tls_local_include_set() in (_ORDINARY, _INFERENCE)
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and _are_plain(arguments)
    )


def _are_plain(values: Iterable[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            if value.is_neg() or value._is_zerotensor():  # not the values that its memory has
                return False
        elif kind not in _NUMBERS and not (kind in (list, tuple) and _are_plain(value)):
            return False
    return True


def steps_of(device_type: str) -> Any:
    """Ops for the kernel of another op, which is made of them: as ``torch.ops.fastfuse`` has them.

    On GPUs these are their kernels. Within a kernel nothing is left to the dispatcher to do, and it
    takes as long as several launches.
    """
    backend = _backend_of_steps.get() if device_type == "cuda" else device_type
    return _STEPS.get(backend, torch.ops.fastfuse)


@dataclass(frozen=True)
class Derivative:
    """The two functions of ``torch.library.register_autograd``.

    Attributes:
        save: (ctx, inputs, output) -> None. ``ctx.needs`` tells for each input whether its gradient
            is wanted, of a list for each of its tensors; ``ctx.backend`` is what runs forward.
        gradients: (ctx, a gradient of each tensor of the output) -> a gradient or None for each
            input, a list for a list. Ops are called as ``op[ctx.backend](...)``.
    """

    save: Callable[[Any, tuple[Any, ...], Any], None]
    gradients: Callable[..., Sequence[Any]]


class Op:
    """An op of PyTorch's, called as ``op[backend](*arguments)``.

    Args:
        schema: as PyTorch's, ``name(Tensor x, ...) -> Tensor``.
        kernels: by backend, fastest first; none yet: the op is its reference alone. Without one for
            ``cuda``, ``triton``'s is that too.
        fake: what it returns, of the same arguments, with no values.
        derivative: None: nothing is ever recorded of it.
        flops: of the arguments, with shapes in the places of tensors.
        flops_of_tensors: whether ``flops`` gets the tensors themselves.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernels: Mapping[str, Kernel],
        fake: Callable[..., Any] | None = None,
        derivative: Derivative | None = None,
        flops: Callable[..., int] | None = None,
        flops_of_tensors: bool = False,
    ) -> None:
        self.name, _, arguments = schema.partition("(")
        kernels = _with_cuda(kernels)
        self.backends = tuple(kernels)
        self._calls: dict[str, _Call] = {}
        calls: dict[str, _Call] = {}  # by overload
        taken: set[str] = set()
        for backend, kernel in kernels.items():
            key = DISPATCH_KEYS[backend]
            overload = f".{backend}" if key in taken else ""
            taken.add(key)
            if overload not in calls:
                name = f"{self.name}{overload}"
                _LIBRARY.define(f"{name}({arguments}", tags=[torch.Tag.pt2_compliant_tag])
                packet = getattr(torch.ops.fastfuse, self.name)
                call = _Call(getattr(packet, overload[1:] or "default"), backend, derivative)
                if fake is not None:
                    torch.library.register_fake(f"fastfuse::{name}", fake)
                if derivative is not None:
                    torch.library.register_autograd(
                        f"fastfuse::{name}", call.gradients, setup_context=call.save
                    )
                calls[overload] = call
            if kernel != COMPILED:
                function = _loaded(kernel, backend)
                _LIBRARY.impl(f"{self.name}{overload}", function, key)
                _KERNELS[key.lower()][f"{self.name}{overload}"] = function
                if backend in _STEPS:
                    setattr(_STEPS[backend], self.name, function)
            self._calls[backend] = calls[overload]
        if flops is not None and kernels:
            register_flop_formula(packet, get_raw=flops_of_tensors)(flops)

    def __getitem__(self, backend: str) -> _Call:
        return self._calls[backend]


class _Call:
    """An overload with its autograd, by the shortest way."""

    def __init__(self, target: Any, backend: str, derivative: Derivative | None) -> None:
        self.target = target
        self.backend = backend
        self.derivative = derivative
        overload = target._overloadname
        self.name = target._opname + ("" if overload == "default" else f".{overload}")
        # A class of its own, for a tensor's grad_fn has its name.
        name = "".join(word.capitalize() for word in target._opname.split("_"))
        self.recorded: Any = type(name, (_Recorded,), {})

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.target(*arguments)
        if self.derivative is not None and torch.is_grad_enabled():
            needs, places, tensors = _needs(arguments)
            if any(tensor.requires_grad for tensor in tensors):
                return self.recorded.apply(self, arguments, needs, places, *tensors)
        return self.run(arguments)

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """Without autograd. The dispatcher takes 10 us and more of host time to come from Python to
        Python, which is saved where it has nothing to do."""
        with below_autograd():
            first = arguments[0]
            if type(first) in (list, tuple):
                first = first[0]
            kernel = _KERNELS.get(first.device.type, {}).get(self.name)
            if kernel is not None and _nothing_to_dispatch(arguments):
                return kernel(*arguments)
            return self.target(*arguments)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self.derivative is not None
        ctx.backend = self.backend
        ctx.needs = _needs(inputs)[0]
        self.derivative.save(ctx, inputs, output)

    def gradients(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        assert self.derivative is not None
        if len(grads) == 1 and isinstance(grads[0], (list, tuple)):  # of an output that is a list
            (grads,) = grads
        try:
            return tuple(self.derivative.gradients(ctx, *grads))
        except RuntimeError as error:
            if "Batching rule" not in str(error):
                raise
            raise RuntimeError(
                f"{self.target._opname}: backward expects plain gradients, got batched ones "
                f"(is_grads_batched, vectorize); fastfuse.backend('reference') runs them"
            ) from error


class _Recorded(torch.autograd.Function):
    """What ``register_autograd`` has of an op, for eager mode.

    Theirs flattens arguments with pytrees to support lists of tensors, which takes longer than all
    of a small call; here the tensors are the arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        arguments: tuple[Any, ...],
        needs: Sequence[Any],
        places: Sequence[tuple[int, int]],
        *tensors: Tensor,
    ) -> Any:
        output = call.run(arguments)
        ctx.call, ctx.backend, ctx.needs, ctx.places = call, call.backend, needs, places
        call.derivative.save(ctx, arguments, output)  # type: ignore[union-attr]
        return tuple(output) if isinstance(output, list) else output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients = ctx.call.gradients(ctx, *grads)
        found: list[Any] = [None] * 4
        for i, count in ctx.places:
            gradient = gradients[i]
            if count:
                found += [None] * count if gradient is None else gradient
            else:
                found.append(gradient)
        return tuple(found)


def _needs(arguments: Sequence[Any]) -> tuple[list[Any], list[tuple[int, int]], list[Tensor]]:
    """Whether each argument's gradient is wanted, of a list for each of its tensors; which of them
    are tensors, or lists of how many; and these tensors."""
    needs: list[Any] = []
    places: list[tuple[int, int]] = []
    tensors: list[Tensor] = []
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            needs.append(value.requires_grad)
            places.append((i, 0))
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            inside = [t for t in value if isinstance(t, Tensor)]
            needs.append([t.requires_grad for t in inside])
            if inside:
                places.append((i, len(inside)))
                tensors += inside
        else:
            needs.append(False)
    return needs, places, tensors


def _with_cuda(kernels: Mapping[str, Kernel]) -> Mapping[str, Kernel]:
    """That backend runs every op of Triton's: in CUDA C++ where there is some."""
    if "triton" not in kernels or "cuda" in kernels:
        return kernels
    others = {name: kernel for name, kernel in kernels.items() if name != "triton"}
    return others | dict.fromkeys(("cuda", "triton"), kernels["triton"])


def kernels_of(op: str, function: str) -> dict[str, Kernel]:
    """Of an op that C++ runs on CPUs, on GPUs a function of ``cuda.py`` and of ``triton.py``."""
    gpus = {backend: f"fastfuse.ops.{op}.{backend}:{function}" for backend in _STEPS}
    return {"cpu": COMPILED, **gpus}


def _loaded(kernel: Kernel, backend: str) -> Callable[..., Any]:
    """A function of a kernel; one that is a function already is made of steps."""
    if not isinstance(kernel, str):
        if backend not in _STEPS:
            return kernel

        def run(*arguments: Any) -> Any:
            token = _backend_of_steps.set(backend)
            try:
                return kernel(*arguments)
            finally:
                _backend_of_steps.reset(token)

        return run
    module, _, name = kernel.partition(":")

    @cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    return lambda *arguments: function()(*arguments)


@dataclass(frozen=True)
class Sample:
    """One input to check an op with: shared by ``verify``, the tests and gradcheck."""

    name: str
    inputs: tuple[Tensor, ...]  # the differentiable arguments
    # The public op on such inputs, in their dtype; of several or of integer outputs something that
    # tells as much, such as the value of the class that was chosen.
    call: Callable[..., Tensor]
    exact: Callable[..., Tensor]  # its definition on float64 inputs
    channels_last: bool  # the memory format the output must have
    # How many values a gradient sums, for all or for each: its tolerance grows by the root.
    reduction: float | tuple[float, ...] = 1.0
    # As much for the output, and how often the fused op rounds on the way to either.
    output_reduction: float = 1.0
    roundings: int = 1
    differentiable: bool = True

    def reduction_of(self, index: int) -> float:
        return self.reduction[index] if isinstance(self.reduction, tuple) else self.reduction


@dataclass(frozen=True)
class Operation:
    """A public op: what its function, ``info``, ``verify`` and the tests need to know.

    Attributes:
        op: what fused backends run.
        reference: the definition, in plain PyTorch, of the same arguments but the last one, which
            is the memory format of the result.
        samples: inputs that exercise it.
        differentiable: whether it has derivatives.
        twice_differentiable: on fused backends, too.
        autocasts: whether autocast casts what it takes.
        keeps_vectors: whether it leaves vectors alone, which are read in float32.
        takes_size: whether calls name a size, which torch.jit.trace would make a constant.
        routes: what typical calls on such an image run, by what the calls are; None: the backend.
    """

    op: Op
    reference: Callable[..., Any] = field(repr=False)
    samples: Callable[..., Iterator[Sample]] = field(repr=False)
    differentiable: bool = True
    twice_differentiable: bool = True
    autocasts: bool = True
    keeps_vectors: bool = False
    takes_size: bool = False
    routes: Callable[[Tensor], dict[str, str]] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def backends(self) -> tuple[str, ...]:
        return self.op.backends

    def run(self, backend: str, device: str, *arguments: Any) -> Any:
        """The op on a backend; arguments are checked, cast for autocast, and as the schema's."""
        if backend != "reference":
            return self.op[backend](*arguments)
        with without_autocast(device):
            return self.reference(*arguments[:-1])


def no_second_derivative(op: str) -> Derivative:
    """Of a backward: an error that says what has it."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise NotImplementedError(
            f"{op}: expected first derivatives, got second ones; "
            "fastfuse.backend('reference') has them"
        )

    return Derivative(save, refuse)
