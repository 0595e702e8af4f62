"""Ops that are whole blocks: one definition of schema, shapes, derivatives and FLOPs for all.

A block takes an image, its parameters and ``keep``, and gives an image of the same shape. For
backward it keeps its image alone, or, hungrier and faster, some tensors besides; the rest is
recomputed. A block's module of kernels sees dense channels_last images and has

    forward(x, parameters, keep, option, keeping) -> (out, the tensors kept, if keeping)
    backward(grad, x, parameters, keep, option, kept, wants_x, wants_parameters)
        -> (grad_x, a gradient for each parameter, None for one that is None)
    kept_shapes(x, parameters)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastfuse.ops.autocast import autocasts, cast_for_autocast, without_autocast
from fastfuse.ops.checks import (
    check_depthwise_weight,
    check_eps,
    check_image,
    check_keep,
    check_matrix,
    check_tensor,
    check_vector,
)
from fastfuse.ops.dispatch import backward_of, below_autograd, recording
from fastfuse.ops.layout import in_layout, is_channels_last, memory_format

__all__ = ["define_block", "prepare"]

_LIBRARY = torch.library.Library("fastfuse", "FRAGMENT")


def prepare(
    op: str,
    x: Tensor,
    names: Sequence[str],
    parameters: Sequence[Tensor | None],
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, list[Tensor | None], Tensor | None, float]:
    """The arguments of a block, checked, and cast for autocast but for norms, biases and scale.

    Shapes follow from names: ``dw*_weight`` is depthwise, ``fc1_weight`` (hidden, C),
    ``fc2_weight`` (C, hidden), ``fc1_bias`` (hidden,), and all others (C,).
    """
    check_image(op, "x", x)
    if x.shape[1] < 1:
        raise ValueError(f"{op}: x must have at least 1 channel; got shape {tuple(x.shape)}")
    by_name: dict[str, Tensor] = {}
    for name, parameter in zip(names, parameters, strict=True):
        if name.endswith("?") and parameter is None:
            continue
        check_tensor(op, name.removesuffix("?"), parameter)
        assert parameter is not None
        by_name[name.removesuffix("?")] = parameter
    cast = [n for n in by_name if n.startswith("dw") or n in ("fc1_weight", "fc2_weight")]
    x, *tensors = cast_for_autocast([x, *(by_name[name] for name in cast)])
    by_name.update(zip(cast, tensors, strict=True))
    channels = x.shape[1]
    fc1 = by_name["fc1_weight"]
    check_matrix(op, "fc1_weight", fc1, (None, channels), "(hidden, C)", x)
    hidden = fc1.shape[0]
    check_matrix(op, "fc2_weight", by_name["fc2_weight"], (channels, hidden), "(C, hidden)", x)
    for name, parameter in by_name.items():
        if name.startswith("dw") and name.endswith("weight"):
            check_depthwise_weight(op, name, parameter, x)
        elif name not in ("fc1_weight", "fc2_weight"):
            of_fc1 = name == "fc1_bias"
            meaning = "one value per row of fc1_weight" if of_fc1 else "one value per channel"
            if autocasts(x.device.type) and parameter.is_floating_point():
                parameter = parameter.to(x.dtype)
            check_vector(op, name, parameter, hidden if of_fc1 else channels, meaning, x)
    check_eps(op, eps)
    check_keep(op, keep, x)
    if keep is not None:  # in the accumulation dtype
        keep = keep.to(torch.promote_types(x.dtype, torch.float32))
    return x, [by_name.get(name.removesuffix("?")) for name in names], keep, float(eps)


def define_block(
    name: str, parameters: Sequence[str], options: Sequence[str], kernel: ModuleType
) -> Callable[..., Tensor]:
    """Defines ``fastfuse::name``, and returns what calls it.

    Args:
        parameters: names, each with a "?" if it may be None; the first is the depthwise weight.
        options: with their types, such as "float eps"; what kernels see is the tuple of them.
        kernel: see above.

    Returns:
        call(x, parameters, keep, options, recompute).
    """
    count = len(parameters)
    arguments = ", ".join(
        f"Tensor{'?' if parameter.endswith('?') else ''} {parameter.removesuffix('?')}"
        for parameter in parameters
    )
    tail = ", ".join(["Tensor? keep", *options])
    for schema in (
        f"{name}(Tensor x, {arguments}, {tail}, bool channels_last) -> Tensor",
        f"{name}_keeping(Tensor x, {arguments}, {tail}, bool channels_last) -> Tensor[]",
        # the gradients of x, if wanted, and of the parameters there are, if wanted
        f"{name}_backward(Tensor grad_output, Tensor x, {arguments}, Tensor[] kept, {tail}, "
        "bool wants_x, bool wants_parameters, bool channels_last) -> Tensor[]",
    ):
        _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])

    def run(x: Tensor, args: Sequence[Any], keeping: bool) -> list[Tensor]:
        *rest, channels_last = args
        weights, keep, option = rest[:count], rest[count], rest[count + 1 :]
        with without_autocast(x.device.type), below_autograd():
            out, kept = kernel.forward(in_layout(x, True), weights, keep, option, keeping)
            return [in_layout(out, channels_last), *kept]

    def forward(x: Tensor, *args: Any) -> Tensor:
        return run(x, args, False)[0]

    def forward_keeping(x: Tensor, *args: Any) -> list[Tensor]:
        return run(x, args, True)

    def backward(grad_output: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
        weights, kept, keep = args[:count], args[count], args[count + 1]
        *option, wants_x, wants_parameters, channels_last = args[count + 2 :]
        with without_autocast(x.device.type), below_autograd():
            grad_x, gradients = kernel.backward(
                in_layout(grad_output, True),
                in_layout(x, True),
                weights,
                keep,
                option,
                kept,
                wants_x,
                wants_parameters,
            )
            results = [in_layout(grad_x, channels_last)] if wants_x else []
            for gradient, weight in zip(gradients, weights, strict=True):
                if wants_parameters and weight is not None:
                    results.append(gradient.to(weight.dtype).reshape(weight.shape).contiguous())
            return results

    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, forward, device)
        _LIBRARY.impl(f"{name}_keeping", forward_keeping, device)
        _LIBRARY.impl(f"{name}_backward", backward, device)

    def like(x: Tensor, channels_last: bool) -> Tensor:
        return torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
        )

    @torch.library.register_fake(f"fastfuse::{name}")
    def _forward_fake(x: Tensor, *args: Any) -> Tensor:
        return like(x, args[-1])

    @torch.library.register_fake(f"fastfuse::{name}_keeping")
    def _keeping_fake(x: Tensor, *args: Any) -> list[Tensor]:
        kept = [
            torch.empty(s, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            for s in kernel.kept_shapes(x, args[:count])
        ]
        return [like(x, args[-1]), *kept]

    @torch.library.register_fake(f"fastfuse::{name}_backward")
    def _backward_fake(grad_output: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
        *_, wants_x, wants_parameters, channels_last = args
        weights = [w for w in args[:count] if w is not None] if wants_parameters else []
        images = [like(x, channels_last)] if wants_x else []
        return images + [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in weights]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *args = inputs
        weights, keep = args[:count], args[count]
        kept = output[1:] if isinstance(output, (list, tuple)) else []
        ctx.option = args[count + 1 : -1]
        ctx.set_materialize_grads(False)  # of what is kept, there are none
        ctx.save_for_backward(x, keep, *weights, *kept)

    def gradients(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * (count + len(options) + 3)
        x, keep, *saved = ctx.saved_tensors
        weights, kept = saved[:count], saved[count:]
        wants_x, *wanted = ctx.needs_input_grad[: count + 1]
        with backward_of(name):
            results = getattr(torch.ops.fastfuse, f"{name}_backward")(
                grad_output, x, *weights, kept, keep, *ctx.option, wants_x, any(wanted),
                is_channels_last([grad_output]),
            )  # fmt: skip
        remaining = iter(results)
        grad_x = next(remaining) if wants_x else None
        of_weights = [next(remaining, None) if weight is not None else None for weight in weights]
        # keep, the options, channels_last
        return grad_x, *of_weights, None, *[None] * len(options), None

    def backward_of_keeping(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return gradients(ctx, grads[0])

    def no_second(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{name}: expected first derivatives, got second ones; "
            "fastfuse.backend('reference') has them"
        )

    torch.library.register_autograd(f"fastfuse::{name}", gradients, setup_context=setup_context)
    torch.library.register_autograd(
        f"fastfuse::{name}_keeping", backward_of_keeping, setup_context=setup_context
    )
    torch.library.register_autograd(f"fastfuse::{name}_backward", no_second)

    def formula(products: int, convolutions: int) -> Callable[..., int]:
        def count_them(*shapes: Any, **kwargs: Any) -> int:
            x_shape, *weights = shapes if products == 1 else shapes[1:]
            names = [parameter.removesuffix("?") for parameter in parameters]
            hidden = weights[names.index("fc1_weight")][0]
            kernel_sizes = [
                shape[2]
                for shape, n in zip(weights, names, strict=False)
                if n.startswith("dw") and n.endswith("weight")
            ]
            pixels = x_shape[0] * x_shape[2] * x_shape[3]
            of_products = 2 * 2 * x_shape[1] * hidden
            of_convolutions = sum(2 * k * k * x_shape[1] for k in kernel_sizes)
            return pixels * (products * of_products + convolutions * of_convolutions)

        return count_them

    operators = torch.ops.fastfuse
    register_flop_formula(getattr(operators, name))(formula(1, 1))
    register_flop_formula(getattr(operators, f"{name}_keeping"))(formula(1, 1))
    # What recomputation adds is not counted, as PyTorch's own formulas do not count what they keep.
    register_flop_formula(getattr(operators, f"{name}_backward"))(formula(2, 2))

    def call(
        x: Tensor,
        weights: Sequence[Tensor | None],
        keep: Tensor | None,
        option: Sequence[Any],
        recompute: bool,
    ) -> Tensor:
        wanted = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *weights)
        )
        channels_last = is_channels_last([x])
        with recording(wanted):
            if wanted and not recompute:
                keeping_op = getattr(operators, f"{name}_keeping")
                return keeping_op(x, *weights, keep, *option, channels_last)[0]
            return getattr(operators, name)(x, *weights, keep, *option, channels_last)

    return call
