"""Modules that run as one op while their children are exactly what the op assumes.

An op reads parameters; it calls no child. Whatever is done to a child (hooks, adapters, pruning,
parametrizations, quantization, offloading, sharding, another class, other attributes) changes what
calling it does, and then it is called: a module is the composition of its children, and its op only
a faster way to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy, Tracer
from torch.nn.modules import module as globally
from torch.utils.module_tracker import ModuleTracker

__all__ = [
    "CONVERTED",
    "Composition",
    "Part",
    "are_untouched",
    "explain",
    "is_plain",
    "is_untouched",
    "is_watched",
    "leaf",
]

# Forwards that convert puts in the place of classes', with the same results.
CONVERTED: set[Callable[..., Any]] = set()
# Tensors that are what they seem; the last two stand for such while a graph is captured.
_PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read a tensor: it is of no subclass, such as DTensor."""
    return type(tensor) in _PLAIN


def _has_hooks(state: Mapping[str, Any]) -> bool:
    """Of a module's attributes."""
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def _convolves_otherwise(conv: nn.Module, convolve: Any) -> bool:
    own = conv._conv_forward is None or "_conv_forward" in conv.__dict__  # guarded, as above
    return own or getattr(type(conv), "_conv_forward", None) is not convolve


@dataclass(frozen=True)
class Part:
    """What an op assumes of a child, beside that nothing was done to it.

    Attributes:
        kinds: the classes it may have, themselves and not their subclasses.
        tensors: the parameters or buffers that the op reads, by name.
        maybe: those of them that may be None.
        conditions: what must hold of the child and its tensors, by the words for what was expected.
        optional: whether the child may be None; then its tensors are.
        methods: of every kind, what calling it runs, as it was when this package was imported.
    """

    kinds: tuple[type[nn.Module], ...]
    tensors: tuple[str, ...]
    maybe: tuple[str, ...] = ()
    conditions: Mapping[str, Callable[..., bool]] = field(default_factory=dict)
    optional: bool = False
    methods: Mapping[type[nn.Module], tuple[Any, Any]] = field(init=False)

    def __post_init__(self) -> None:
        found = {kind: (kind.forward, getattr(kind, "_conv_forward", None)) for kind in self.kinds}
        object.__setattr__(self, "methods", found)

    def read(self, child: nn.Module | None, into: list[Any]) -> str | None:
        """Appends the child's tensors; or what of it is not as assumed, as the end of a sentence
        that begins with its name."""
        if child is None:
            into.extend([None] * len(self.tensors))
            return None if self.optional else "is None"
        methods = self.methods.get(type(child))
        if methods is None:
            return f"is a {type(child).__module__}.{type(child).__qualname__}"
        state = child.__dict__
        first, parameters, buffers = len(into), state["_parameters"], state["_buffers"]
        for name in self.tensors:
            tensor: Tensor | None = parameters.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None:
                if name in state:
                    return f"has a computed {name}"
                if name not in self.maybe:
                    return f"has no {name}"
            elif type(tensor) not in _PLAIN:
                return f"has a {type(tensor).__name__} as {name}"
            into.append(tensor)
        if _has_hooks(state):
            return "has hooks"
        # Set on the module or, since the import, on its class. Dynamo guards a forward that is read
        # as an attribute, and finds one that is set among the module's own.
        forward, convolve = methods
        own = state.get("forward")
        if (
            child.forward is None
            or type(child).forward is not forward
            or (own is not None and getattr(own, "__func__", None) not in CONVERTED)
            or (convolve is not None and _convolves_otherwise(child, convolve))
        ):
            return "has a forward of its own"
        if "_compiled_call_impl" in state:
            return "is compiled by itself"
        for expected, holds in self.conditions.items():
            if not holds(child, *into[first:]):
                return f"is not as expected: {expected}"
        return None


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward, or ours, and nothing else."""
    state = module.__dict__
    if "forward" in state and getattr(state["forward"], "__func__", None) not in CONVERTED:
        return False
    return not (_has_hooks(state) or "_compiled_call_impl" in state)


def are_untouched(*modules: nn.Module) -> bool:
    return not is_watched() and all(is_untouched(module) for module in modules)


class Composition(nn.Module):
    """A module that runs as one op if its ``parts`` are as assumed, else calls them."""

    parts: ClassVar[Mapping[str, Part]] = {}

    def read_parts(self) -> list[Any] | str:
        """The tensors of all parts, for the op; or why it cannot be used, in words."""
        if is_watched():
            return "hooks on all modules"
        tensors: list[Any] = []
        children = self._modules
        for name, part in self.parts.items():
            reason = part.read(children.get(name), tensors)
            if reason is not None:
                return f"{name} {reason}"
        return tensors


def is_watched() -> bool:
    """Whether hooks of all modules are to see the children. Counting FLOPs is no reason: it would
    change what it counts."""
    if not (
        globally._global_forward_pre_hooks
        or globally._global_forward_hooks
        or globally._global_backward_pre_hooks
        or globally._global_backward_hooks
    ):
        return False
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in (
            globally._global_forward_pre_hooks,
            globally._global_forward_hooks,
            globally._global_backward_pre_hooks,
            globally._global_backward_hooks,
        )
        for hook in hooks.values()
    )


Forward = TypeVar("Forward", bound=Callable[..., Any])


def leaf(forward: Forward) -> Forward:
    """A module's forward of which torch.fx records the call, as of PyTorch's own modules."""

    @wraps(forward)
    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        for value in x if isinstance(x, (list, tuple)) else (x,):
            if not isinstance(value, Tensor) and isinstance(value, Proxy):
                tracer = cast(Tracer, value.tracer)
                if tracer.root is self:
                    break
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    return cast(Forward, recorded)


def explain(module: nn.Module) -> dict[str, str | None]:
    """Which modules of a model run as one op, and why the others do not.

    Args:
        module: a model, or a module of this package.

    Returns:
        By name, "" for the module itself, every module that has an op: None where it runs, else the
        reason why the module's children are called, one by one. Results are the same to rounding.
        Of graphs that were traced or exported there is nothing to tell.

    Raises:
        TypeError: no module.

    >>> import torch, fastfuse
    >>> block = fastfuse.nn.CEDBlock(8)
    >>> fastfuse.explain(block)
    {'': None}
    >>> handle = block.fc1.register_forward_hook(lambda module, inputs, output: None)
    >>> fastfuse.explain(block)
    {'': 'fc1 has hooks'}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module must be an nn.Module; got {type(module).__name__}")
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, Composition):
            read = child.read_parts()
            found[name] = read if isinstance(read, str) else None
    return found
