"""The one way to define an op that is a block of a network (an MLP, convolutions before it).

A block takes a feature map, its parameters and ``keep``, and gives a map of the same shape. For
backward it keeps its input alone, or, hungrier and faster, some tensors besides; the rest is
recomputed. A block's module of kernels sees dense channels_last maps and has

    forward(x, parameters, keep, options, keeping) -> (out, the tensors kept, if keeping)
    backward(grad, x, parameters, keep, options, kept, wants_x, wants_parameters)
        -> (grad_x, a gradient for each parameter, None for one that is None)
    kept_shapes(x, parameters)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype, select, wants_gradients
from fastfuse.ops.autocast import (
    autocasts,
    cast_for_autocast,
    vector_for_autocast,
    without_autocast,
)
from fastfuse.ops.checks import (
    check_depthwise_weight,
    check_eps,
    check_feature_map,
    check_keep,
    check_matrix,
    check_tensor,
    check_vector,
)
from fastfuse.ops.define import (
    Derivative,
    Op,
    Operation,
    Sample,
    below_autograd,
    no_second_derivative,
)
from fastfuse.ops.layout import is_channels_last, memory_format, to_memory_format
from fastfuse.ops.pointwise.mlp import mlp_route

__all__ = ["MLP_PARAMETERS", "BlockOp", "BlockParameter", "convolution_and_norm_parameters"]


@dataclass(frozen=True)
class BlockParameter:
    """A block's parameter.

    Attributes:
        kind: of what shape it is: "depthwise" (C, 1, k, k), "channels" (C,), "fc1" (hidden, C),
            "hidden" (hidden,), "fc2" (C, hidden).
        optional: whether it may be None.
    """

    name: str
    kind: str
    optional: bool = False

    @property
    def is_cast(self) -> bool:
        """Whether autocast casts it: what is multiplied with pixels."""
        return self.kind in ("depthwise", "fc1", "fc2")


def convolution_and_norm_parameters(suffix: str = "") -> tuple[BlockParameter, ...]:
    return (
        BlockParameter(f"dw{suffix}_weight", "depthwise"),
        BlockParameter(f"dw{suffix}_bias", "channels"),
        BlockParameter(f"norm{suffix}_weight", "channels"),
        BlockParameter(f"norm{suffix}_bias", "channels"),
    )


MLP_PARAMETERS = (
    BlockParameter("fc1_weight", "fc1"),
    BlockParameter("fc1_bias", "hidden"),
    BlockParameter("fc2_weight", "fc2"),
    BlockParameter("fc2_bias", "channels"),
    BlockParameter("layer_scale", "channels", optional=True),
)


class BlockOp:
    """Defines ``fastfuse::name``, ``name_keeping`` and ``name_backward``; called as the op.

    Args:
        parameters: in the order of the schema.
        options: with their types, such as "float eps"; kernels see the tuple of them.
        kernel: see above.
        reference: (x, *parameters, keep, *options) -> the result.
        samples: inputs that exercise it.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[BlockParameter],
        options: Sequence[str],
        *,
        kernel: ModuleType,
        reference: Callable[..., Tensor],
        samples: Callable[..., Iterator[Sample]],
    ) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        self.kernel = kernel
        self.reference = reference
        self._fc1 = [p.kind for p in parameters].index("fc1")
        self._depthwise = [i for i, p in enumerate(parameters) if p.kind == "depthwise"]
        tensors = ", ".join(f"Tensor{'?' if p.optional else ''} {p.name}" for p in parameters)
        tail = ", ".join(["Tensor? keep", *options])
        first = Derivative(self._save, self._gradients)
        self.forward = self._op(
            f"{name}(Tensor x, {tensors}, {tail}, bool channels_last) -> Tensor",
            lambda x, *args: self._forward(x, args, keeping=False)[0],
            lambda x, *args: self._empty(x, args[-1]),
            first,
            lambda x, *shapes, **_: self._flops(x, shapes, 1),
        )
        self.forward_keeping = self._op(
            f"{name}_keeping(Tensor x, {tensors}, {tail}, bool channels_last) -> Tensor[]",
            lambda x, *args: self._forward(x, args, keeping=True),
            self._keeping_fake,
            first,
            lambda x, *shapes, **_: self._flops(x, shapes, 1),
        )
        # The gradients of x, if wanted, and of the parameters there are, if wanted. What
        # recomputation adds is not counted, as PyTorch's own formulas do not count what they keep.
        self.backward = self._op(
            f"{name}_backward(Tensor grad_output, Tensor x, {tensors}, Tensor[] kept, {tail}, "
            "bool wants_x, bool wants_parameters, bool channels_last) -> Tensor[]",
            self._backward,
            self._backward_fake,
            no_second_derivative(name),
            lambda grad, x, *shapes, **_: self._flops(x, shapes, 2),
        )
        self.operation = Operation(
            self.forward,
            self._reference,
            samples,
            twice_differentiable=False,
            keeps_vectors=True,
            routes=self._routes,
        )

    @staticmethod
    def _op(
        schema: str, kernel: Any, fake: Any, derivative: Derivative, flops: Callable[..., int]
    ) -> Op:
        kernels = dict.fromkeys(("cpu", "triton"), kernel)
        return Op(schema, kernels=kernels, fake=fake, derivative=derivative, flops=flops)

    # ---- calls -----------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        keep: Tensor | None,
        options: Sequence[Any],
        recompute: bool,
    ) -> Tensor:
        """Of arguments as users give them; the last of the options is eps."""
        x, parameters, keep = self._checked(x, parameters, keep)
        check_eps(self.name, options[-1])
        options = (*options[:-1], float(options[-1]))
        backend, channels_last = select(self.operation, x), is_channels_last([x])
        arguments = (x, *parameters, keep, *options, channels_last)
        if backend == "reference" or not torch.is_grad_enabled():
            return self.operation.run(backend, x.device.type, *arguments)
        if recompute and not self._keeps_little(x, parameters):
            return self.operation.run(backend, x.device.type, *arguments)
        if not wants_gradients((x, *parameters)):
            return self.forward[backend](*arguments)
        return self.forward_keeping[backend](*arguments)[0]

    def _checked(
        self, x: Tensor, given: Sequence[Tensor | None], keep: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Cast for autocast, but for norms, biases and scale, which are read in their dtype."""
        op = self.name
        check_feature_map(op, "x", x)
        if x.shape[1] < 1:
            raise ValueError(f"{op}: x must have at least 1 channel; got shape {tuple(x.shape)}")
        found = list(given)
        present = [
            (i, p) for i, p in enumerate(self.parameters) if not (p.optional and given[i] is None)
        ]
        for i, parameter in present:
            check_tensor(op, parameter.name, given[i])
        autocast = autocasts(x.device.type)
        if autocast:
            cast = [i for i, parameter in present if parameter.is_cast]
            x, *tensors = cast_for_autocast([x, *(found[i] for i in cast)])  # type: ignore[list-item]
            for i, cast_one in zip(cast, tensors, strict=True):
                found[i] = cast_one
        channels = x.shape[1]
        fc1: Any = found[self._fc1]
        check_matrix(op, "fc1_weight", fc1, (None, channels), "(hidden, C)", x)
        hidden = fc1.shape[0]
        for i, parameter in present:
            name = parameter.name
            tensor: Any = found[i]
            if parameter.kind == "depthwise":
                check_depthwise_weight(op, name, tensor, x)
            elif parameter.kind == "fc2":
                check_matrix(op, name, tensor, (channels, hidden), "(C, hidden)", x)
            elif parameter.kind != "fc1":
                if autocast:
                    found[i] = tensor = vector_for_autocast(tensor, x)
                of_fc1 = parameter.kind == "hidden"
                meaning = "one value per row of fc1_weight" if of_fc1 else "one value per channel"
                length = hidden if of_fc1 else channels
                check_vector(op, name, tensor, length, meaning, x, wide=True)
        check_keep(op, keep, x)
        if keep is not None:  # in the accumulation dtype
            keep = keep.to(accumulation_dtype(x.dtype))
        return x, found, keep

    def _reference(self, x: Tensor, *arguments: Any) -> Tensor:
        count = len(self.parameters)
        same = [p if p is None else p.to(x.dtype) for p in arguments[:count]]
        return self.reference(x, *same, *arguments[count:])

    def _routes(self, image: Tensor) -> dict[str, str]:
        return {"hidden 4 C": mlp_route(select(self.operation, image), image)}

    def _keeps_little(self, x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
        """Whether what recomputation spares is no more than the parameters and their gradients: of
        small maps of many channels. In a graph that is captured sizes may not be known."""
        if torch.compiler.is_compiling():
            return False
        kept = sum(math.prod(shape) for shape in self.kernel.kept_shapes(x, parameters))
        return kept <= 2 * sum(p.numel() for p in parameters if p is not None)

    # ---- kernels ---------------------------------------------------------------------------------

    def _forward(self, x: Tensor, arguments: Sequence[Any], *, keeping: bool) -> list[Tensor]:
        weights, (keep, *options, channels_last) = self._split(arguments)
        with without_autocast(x.device.type), below_autograd():
            x = to_memory_format(x, True)
            out, kept = self.kernel.forward(x, weights, keep, options, keeping)
            return [to_memory_format(out, channels_last), *kept]

    def _backward(self, grad_output: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
        weights, rest = self._split(arguments)
        kept, keep, *options, wants_x, wants_parameters, channels_last = rest
        with without_autocast(x.device.type), below_autograd():
            grad_x, gradients = self.kernel.backward(
                to_memory_format(grad_output, True),
                to_memory_format(x, True),
                weights,
                keep,
                options,
                kept,
                wants_x,
                wants_parameters,
            )
            results = [to_memory_format(grad_x, channels_last)] if wants_x else []
            for gradient, weight in zip(gradients, weights, strict=True):
                if wants_parameters and weight is not None:
                    results.append(gradient.to(weight.dtype).reshape(weight.shape).contiguous())
            return results

    def _split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Parameters, and what follows them."""
        count = len(self.parameters)
        return arguments[:count], arguments[count:]

    # ---- shapes, derivatives, FLOPs --------------------------------------------------------------

    @staticmethod
    def _empty(x: Tensor, channels_last: bool) -> Tensor:
        return torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
        )

    def _keeping_fake(self, x: Tensor, *arguments: Any) -> list[Tensor]:
        weights, (*_, channels_last) = self._split(arguments)
        kept = [
            torch.empty(s, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            for s in self.kernel.kept_shapes(x, weights)
        ]
        return [self._empty(x, channels_last), *kept]

    def _backward_fake(self, grad_output: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
        weights, (*_, wants_x, wants_parameters, channels_last) = self._split(arguments)
        grad_x = [self._empty(x, channels_last)] if wants_x else []
        wanted = [w for w in weights if w is not None] if wants_parameters else []
        return grad_x + [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in wanted]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *arguments = inputs
        weights, (keep, *ctx.options, _) = self._split(arguments)
        kept = output[1:] if isinstance(output, (list, tuple)) else []
        ctx.set_materialize_grads(False)  # of what is kept, there are none
        ctx.save_for_backward(x, keep, *weights, *kept)

    def _gradients(self, ctx: Any, grad_output: Tensor | None, *_: Any) -> Sequence[Any]:
        x, keep, *saved = ctx.saved_tensors
        weights, kept = self._split(saved)
        after = [None] * (len(ctx.options) + 2)  # keep, the options, channels_last
        if grad_output is None:
            return None, *[None] * len(weights), *after
        wants_x, *wanted = ctx.needs[: len(weights) + 1]
        found = self.backward[ctx.backend](
            grad_output, x, *weights, kept, keep, *ctx.options, wants_x, any(wanted),
            is_channels_last([grad_output]),
        )  # fmt: skip
        remaining = iter(found)
        grad_x = next(remaining) if wants_x else None
        of_weights = [None if weight is None else next(remaining, None) for weight in weights]
        return grad_x, *of_weights, *after

    def _flops(self, x: torch.Size, shapes: Sequence[Any], products: int) -> int:
        hidden = shapes[self._fc1][0]
        batch, channels, height, width = x
        of_products = 2 * 2 * channels * hidden
        of_convolutions = sum(2 * shapes[i][2] ** 2 * channels for i in self._depthwise)
        return products * batch * height * width * (of_products + of_convolutions)
