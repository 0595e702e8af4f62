"""Models in PyTorch's own operations, for every exporter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastfuse.conversion import convert
from fastfuse.conversion.plain_ops import AdaptivePooling, Fusion, pays_winograd
from fastfuse.ops import OPERATIONS
from fastfuse.ops.define import Operation
from fastfuse.ops.mlp_block import BLOCK as MLP_BLOCK
from fastfuse.ops.upsample_argmax.reference import reference as argmax
from fastfuse.ops.window_attention.reference import reference as window_attention

__all__ = ["plain"]

aten = torch.ops.aten
_CONSTANTS = "plain_constants"  # the child that holds them
Function = Callable[..., Any]


def plain(model: nn.Module, *inputs: Any, winograd: bool = True) -> nn.Module:
    """The same model of PyTorch's own operations, for inference where this package is not.

    For ``torch.onnx.export``, OpenVINO's converter and others. What :func:`fastfuse.convert` knows
    of the model is written as deployment runtimes run it fastest: a fusion convolves each level at
    its own resolution, and sampling is a product with a constant matrix. Adaptive pooling has fixed
    windows. Results are those of the model in evaluation, up to rounding.

    Args:
        model: any module that ``torch.export`` takes; it is not changed.
        inputs: what it is called with; the result is for their shapes, on their device.
        winograd: whether large 3x3 convolutions are products of tiles (F(4x4, 3x3)), which CPU
            runtimes do not make of them; they round a little more. False for GPUs.

    Returns:
        A module of the same inputs and outputs. It shares the model's parameters and buffers, and
        has their names; constants of its own are no part of its ``state_dict``.

    Raises:
        TypeError: no module, or no tensor among the inputs.
        ValueError: inputs that the model does not take; a model that copy.deepcopy or torch.export
            does not take, that normalizes by its batch or that returns a loss.

    Source: the identity is :func:`fastfuse.fusion_conv2d`'s; Lavin and Gray, *Fast Algorithms for
    Convolutional Neural Networks* (2015). docs/deploy.md has the runtimes' figures.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.UPerHead([8, 16], channels=16, num_classes=5).eval()
    >>> levels = [torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)]
    >>> plain = fastfuse.plain(head, levels)
    >>> torch.testing.assert_close(plain(levels), head(levels))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"plain: model must be an nn.Module; got {type(model).__name__}")
    leaves = torch.utils._pytree.tree_leaves(inputs)
    if not any(isinstance(x, Tensor) for x in leaves):
        raise TypeError("plain: inputs must be what the model is called with; got no tensor")
    graph = _exported(_converted(model), inputs, leaves)
    _replace_ops(graph, winograd)
    return _exported(graph, inputs, leaves)


def _converted(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, in evaluation."""
    shared = chain(model.parameters(), model.buffers())
    try:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
    except Exception as error:
        raise ValueError(f"plain: copy.deepcopy does not take the model: {error}") from error
    convert(twin)
    return twin


def _exported(model: nn.Module, inputs: tuple[Any, ...], leaves: list[Any]) -> GraphModule:
    shapes = ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))
    with torch.no_grad():
        try:
            program = torch.export.export(model, inputs)
        except Exception as error:
            try:
                model(*inputs)
            except Exception as own:
                message = f"plain: the model does not take inputs of shapes {shapes}: {own}"
                raise ValueError(message) from own
            raise ValueError(f"plain: torch.export does not take the model: {error}") from error
    module = program.module(check_guards=False)  # exporters trace it
    assert isinstance(module, GraphModule)
    for name in ("train", "eval"):  # tracers call what torch.export forbids: the graph has no modes
        module.__dict__.pop(name, None)
    module.eval()
    return module


def _replace_ops(module: GraphModule, winograd: bool) -> None:
    constants = nn.ModuleDict()
    module.add_module(_CONSTANTS, constants)
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        replacement = _replacement(node, _arguments(node), winograd)
        if replacement is None:
            continue
        function, arguments = replacement
        last = node
        if isinstance(function, Fusion) and (norm := _batch_norm_of(node)) is not None:
            values = _arguments(norm)
            names = ("weight", "bias", "running_mean", "running_var", "eps")
            arguments, last = (*arguments, [values[name] for name in names]), norm
        with module.graph.inserting_before(last):
            if isinstance(function, nn.Module):
                constants[node.name] = function
                new = module.graph.call_module(f"{_CONSTANTS}.{node.name}", arguments)
            else:
                new = module.graph.call_function(function, arguments)
        new.meta = last.meta
        last.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()
    module.recompile()


def _arguments(node: Node) -> dict[str, Any]:
    """By the names of the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else None
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.kwargs.get(argument.name, default) if given is None else given
    return found


def _batch_norm_of(node: Node) -> Node | None:
    """The batch norm that alone reads a convolution."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    is_norm = user.target == aten.batch_norm.default and user.args[0] is node
    return user if is_norm else None


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _replacement(
    node: Node, values: dict[str, Any], winograd: bool
) -> tuple[Function, tuple[Any, ...]] | None:
    """What stands for a node, and its arguments; None: the node itself."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target == aten.batch_norm.default and values["training"]:
        raise ValueError(
            "plain: expected a model that in evaluation does not depend on the batch; got a batch "
            f"norm without running statistics, of an input of shape {_shape(values['input'])}"
        )
    if target == aten.adaptive_avg_pool2d.default:
        x, size = values.values()
        return AdaptivePooling(_shape(x)[2:], size, x.meta["val"].dtype), (x,)
    if target == aten.conv2d.default:
        x, weight, bias, stride, padding, dilation, groups = values.values()
        ones = {*stride, *dilation, groups, *padding} == {1}
        if winograd and ones and pays_winograd(_shape(weight), padding[0]):
            return _fusion([x], weight, bias, _shape(x)[2:], None, None, 1, False, winograd)
    if target.namespace != "fastfuse":
        return None
    name = target._opname
    if name == "upsample_cross_entropy":
        raise ValueError("plain: expected a model that returns no loss in evaluation; got one")
    if name == "fusion_conv2d":
        *arguments, align_corners, _ = values.values()
        features, weight, bias, *size, mean, std, padding = arguments
        return _fusion(features, weight, bias, size, mean, std, padding, align_corners, winograd)
    if name not in _PLAIN:
        raise ValueError(f"plain: no operations of PyTorch are known for fastfuse::{name}")
    return _PLAIN[name], tuple(values.values())


def _argmax(confidence: bool) -> Function:
    def run(logits: Tensor, height: int, width: int, align_corners: bool) -> Any:
        return argmax(logits, (height, width), align_corners, confidence)

    return run


def _definition(operation: Operation) -> Function:
    """An op's reference; the last argument is the memory format of the result."""
    return lambda *arguments: operation.reference(*arguments[:-1])


# What needs no constants, by the names of ops.
_PLAIN: dict[str, Function] = {
    "copy_layout": lambda image, channels_last: image,
    "upsample_argmax": _argmax(False),
    "upsample_argmax_confidence": _argmax(True),
    **{
        name: _definition(OPERATIONS[name])
        for name in (
            "ced_block", "depthwise_conv2d", "lr_ced_block", "tap_sum", "upsample_add",
            "upsample_equalize_concat",
        )
    },
    "mlp_block": _definition(MLP_BLOCK.operation),
    "window_attention": window_attention,
}  # fmt: skip


def _fusion(
    features: list[Node], weight: Node, bias: Any, size: Any, mean: Any, std: Any, padding: int,
    align_corners: bool, winograd: bool,
) -> tuple[Function, tuple[Any, ...]]:  # fmt: skip
    shapes, dtype = [_shape(x) for x in features], weight.meta["val"].dtype
    module = Fusion(shapes, _shape(weight), size, padding, align_corners, dtype, winograd)
    return module, (features, weight, bias, mean, std)
