"""Modules of no known class that interpolate, concatenate and convolve.

torch.fx records a module's own forward, its children as calls; where bilinear ``interpolate`` ->
``cat`` -> a child that begins with a convolution stand in the graph, the three become one call. A
graph holds what its forward decided when it was recorded. So a forward that decides by anything but
its module's plain attributes and the number of its children is left, and both are compared at every
call.
"""

from __future__ import annotations

import builtins
import dis
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastfuse.conversion.parts import fused, is_dense, is_sequence
from fastfuse.conversion.pattern import Pattern
from fastfuse.nn.composition import CONVERTED, is_watched

__all__ = ["traced_pattern_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CATS = (torch.cat, torch.concat, torch.concatenate)
_WRITING = {"setitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod"}
_WRITING |= {"imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor"}
_BUILTINS = {"enumerate", "len", "list", "range", "reversed", "tuple", "zip"}
# What a graph cannot tell: modes and random numbers, by the beginnings of names of functions.
_MODES = (
    *("training", "is_", "get_", "set_", "manual_seed", "no_grad", "enable_grad", "autocast"),
    *("amp", "autograd", "checkpoint", "compile", "cuda", "jit", "rand", "utils"),
)
_SOURCES = ("torch", "torch.nn", "torch.nn.functional")
_LEFT_OPCODES = {
    "STORE_ATTR": "sets attributes",
    "DELETE_ATTR": "sets attributes",
    "STORE_GLOBAL": "sets globals",
    "IS_OP": "tests what is None",
    "BEFORE_WITH": "has a with block",
    "SETUP_WITH": "has a with block",
    "SETUP_FINALLY": "catches errors",
    "PUSH_EXC_INFO": "catches errors",
    "IMPORT_NAME": "imports",
}


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def traced_pattern_of(module: nn.Module) -> tuple[Pattern, str | None] | None:
    """The pattern of a module of no known class, and then why it is left; None: it has no such
    chain, as far as its code tells."""
    kind = type(module)
    if kind.__module__.partition(".")[0] in ("torch", "fastfuse"):
        return None  # TorchScript's have no forward to look at
    forward = kind.forward
    if not isinstance(forward, FunctionType):
        return None
    names = {name for code in _codes(forward.__code__) for name in code.co_names}
    if "interpolate" not in names or not names & {"cat", "concat", "concatenate"}:
        return None
    target = f"{kind.__module__}:{kind.__qualname__}"
    if "forward" in module.__dict__:
        bound = getattr(module.__dict__["forward"], "__func__", None)
        reason = None if bound in CONVERTED else "has a forward of its own"
        return Pattern(target, bound or forward), reason
    reason = _undecidable(module, forward, names)
    if reason is not None:
        return Pattern(target, forward), reason
    try:
        graph = _LeafTracer().trace(_shallow_copy(module))
    except Exception as error:  # whatever the code of others raises when it meets a proxy
        words = str(error).partition("\n")[0].partition(". ")[0]
        if "cannot be iterated" in words:
            return Pattern(target, forward), "loops over an input: index or unpack it instead"
        return Pattern(target, forward), f"is not traced by torch.fx: {words}"
    if any(map(_writes, graph.nodes)):
        return Pattern(target, forward), "writes into tensors"
    if not _fuse_chains(graph, module):
        return None
    if any(n.op == "get_attr" and "_tensor_constant" in str(n.target) for n in graph.nodes):
        return Pattern(target, forward), "makes a tensor of its own"
    return Pattern(target, _generated(graph, module, names)), None


def _shallow_copy(module: nn.Module) -> nn.Module:
    """On which tracing may set what it likes."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


# ---- what a graph can hold ----


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _undecidable(module: nn.Module, forward: FunctionType, names: set[str]) -> str | None:
    code = forward.__code__
    if code.co_flags & 0b1100 or code.co_freevars:  # *args, **kwargs; super, closures
        return "takes any arguments, or calls its base class"
    for name in sorted(names):
        if name.startswith(_MODES):
            return f"asks for {name}"
        own = any(name in vars(c) for c in type(module).__mro__ if c not in nn.Module.__mro__)
        if own and name not in module.__dict__:
            return f"calls its method {name}"
    for inner in _codes(code):
        for instruction in dis.get_instructions(inner):
            reason = _LEFT_OPCODES.get(instruction.opname)
            if reason is None and "NONE" in instruction.opname:  # POP_JUMP_IF_NONE and its like
                reason = "tests what is None"
            if reason is None and "GLOBAL" in instruction.opname:
                reason = _strange_global(forward, str(instruction.argval))
            if reason is not None:
                return reason
    held = [value for _, value in _read(module, names)]
    return None if all(map(_is_constant, held)) else "holds what may change without notice"


def _strange_global(forward: FunctionType, name: str) -> str | None:
    if name not in forward.__globals__:
        known = name in _BUILTINS and hasattr(builtins, name)
        return None if known else f"calls {name}"
    value = forward.__globals__[name]
    if isinstance(value, ModuleType):
        known = value.__name__ in _SOURCES
    else:
        known = value in _CATS or getattr(value, "__module__", None) in _SOURCES
    return None if known or _is_constant(value) else f"calls {name}"


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


Place = tuple[tuple[str, ...], str]  # names of the modules on the way to an attribute, and its own


def _read(
    module: nn.Module, names: set[str], path: tuple[str, ...] = ()
) -> list[tuple[Place, Any]]:
    """Attributes that a forward may read, of the module and of those inside it."""
    found = [((path, n), v) for n, v in sorted(module.__dict__.items()) if n in names]
    for name, child in module._modules.items():
        found += [] if child is None else _read(child, names, (*path, name))
    return found


def _held(module: nn.Module, places: Sequence[Place]) -> list[Any]:
    """What the forward decided by: attributes, and how many children there are."""
    values = [_attribute(module, *place) for place in places]
    constants = [list(v) if isinstance(v, list) else v for v in values]
    return [*constants, *_counts(module)]


def _attribute(module: nn.Module | None, path: Sequence[str], name: str) -> Any:
    for child in path:
        module = None if module is None else module._modules.get(child)
    return None if module is None else module.__dict__.get(name)


def _counts(module: nn.Module) -> list[Any]:
    return [
        (name, _counts(child) if isinstance(child, _CONTAINERS) else child is None)
        for name, child in module._modules.items()
    ]


# ---- the graph ----


def _fuse_chains(graph: fx.Graph, module: nn.Module) -> int:
    """Puts one call in the place of every chain; how many there were."""
    count, order = 0, {node: i for i, node in enumerate(graph.nodes)}
    for node in list(order):
        if node.op != "call_module" or node.kwargs or len(node.args) != 1:
            continue
        cat = node.args[0]
        maps = _concatenated_maps(cat)
        if maps is None or not _begins_with_convolution(module.get_submodule(node.target)):
            continue
        levels, read = [], []
        for x in maps:
            given = _interpolation(x)
            levels.append((x, None, None, None) if given is None else given)
            read.append((levels[-1][0], order[cat if given is None else x]))
        if len(read) == sum(level[3] is None for level in levels):
            continue
        # Reads that move past a child: it may write what it is given.
        if any(
            s < order[u] < order[node] and u.op == "call_module" for x, s in read for u in x.users
        ):
            continue
        with graph.inserting_before(node):
            child = graph.create_node("get_attr", node.target)
            call = graph.call_function(_convolved_levels, (child, levels))
        node.replace_all_uses_with(call)
        for old in (node, cat, *maps):
            if not old.users and (old in (node, cat) or old.target is F.interpolate):
                graph.erase_node(old)
        count += 1
    return count


def _writes(node: fx.Node) -> bool:
    """Whether a step of a graph changes a tensor, by its name."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and (
        name.endswith("_")
        or name in _WRITING
        or node.kwargs.get("out") is not None
        or (node.target is not F.interpolate and any(a is True for a in node.args))  # inplace
        or node.kwargs.get("inplace") not in (None, False)
    )


def _concatenated_maps(node: Any) -> Sequence[fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target not in _CATS or len(node.users) != 1:
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    maps: Any = given.pop("tensors", None)
    is_of_nodes = isinstance(maps, (list, tuple)) and all(isinstance(x, fx.Node) for x in maps)
    return maps if is_of_nodes and given in ({"dim": 1}, {"dim": -3}) else None


def _interpolation(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """Of a call of interpolate: the map, size, scale factor and align_corners."""
    if node.target is not F.interpolate:
        return None
    names = ("input", "size", "scale_factor", "mode", "align_corners")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, mode = given.pop("input"), given.pop("mode", "nearest")
    size, scale, corners = (given.pop(n, None) for n in names[1:3] + names[4:])
    if mode != "bilinear" or any(given.values()) or len(node.args) > len(names):
        return None
    return (x, size, scale, bool(corners)) if isinstance(corners, (bool, type(None))) else None


def _begins_with_convolution(child: nn.Module) -> bool:
    while is_sequence(child):
        child = child[0]  # type: ignore[index]
    return is_dense(child)


def _convolved_levels(
    child: nn.Module, levels: Sequence[tuple[Tensor, Any, Any, bool | None]]
) -> Tensor:
    """A chain: of maps that are concatenated as they are, or interpolated first."""
    targets = [_target(x, size, scale) for x, size, scale, _ in levels]
    corners = {c for _, _, _, c in levels if c is not None}
    if None in targets or len(corners) > 1 or any(t != targets[0] for t in targets):
        return child(torch.cat([_interpolated(*level) for level in levels], dim=1))
    maps = [x for x, *_ in levels]
    assert targets[0] is not None
    return fused(child, maps, targets[0], corners.pop())


def _interpolated(x: Tensor, size: Any, scale: Any, corners: bool | None) -> Tensor:
    if corners is None:
        return x
    return F.interpolate(x, size, scale, "bilinear", corners)


def _target(x: Tensor, size: Any, scale: Any) -> tuple[int, int] | None:
    """The size that a map is brought to; None: not the one that ops have by the same rule."""
    if x.dim() != 4:
        return None
    if size is not None:
        pair = (size, size) if isinstance(size, (int, torch.SymInt)) else tuple(size)
        return pair if scale is None and len(pair) == 2 else None
    if scale is None:
        return (x.shape[2], x.shape[3])
    if not isinstance(scale, (int, float)) or scale < 1 or scale != int(scale):
        return None
    return (int(scale) * x.shape[2], int(scale) * x.shape[3])


_GENERATED: dict[tuple[Any, ...], Callable[..., Any]] = {}  # equal graphs are one forward


def _generated(graph: fx.Graph, module: nn.Module, names: set[str]) -> Callable[..., Any]:
    read = [place for place, _ in _read(module, names - {"forward"})]
    state = _held(module, read)
    code = graph.python_code("self")
    key = (type(module), code.src, repr((read, state)))
    if key in _GENERATED:
        return _GENERATED[key]
    namespace = dict(code.globals)
    exec(code.src, namespace)
    run = namespace["forward"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_watched() or _held(self, read) != state:
            return type(self).forward(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    _GENERATED[key] = forward
    return forward
