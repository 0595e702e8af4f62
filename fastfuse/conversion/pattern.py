"""What is known of a class of another library: when, and how, this package runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from fastfuse.nn.composition import CONVERTED

__all__ = [
    "PATTERNS",
    "Pattern",
    "as_forward_of",
    "holds_proxies",
    "is_converted",
    "kinds_of_patterns",
    "pattern_of",
    "register_pattern",
]

Forward = Callable[..., Any]
Check = Callable[[nn.Module], "str | None"]


def _nothing(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Pattern:
    """How modules of a class run.

    Attributes:
        target: the class, "package.module:Name"; its library need not be there.
        forward: in the place of the class's: (module, the same arguments) -> the same result.
        check: of a module, None or why it is left, as the end of a sentence; "" where there is
            nothing to tell.
        methods: other methods that the class's forward calls and this one does not: a subclass with
            its own is left.
    """

    target: str
    forward: Forward = field(repr=False)
    check: Check = field(default=_nothing, repr=False)
    methods: tuple[str, ...] = ()

    @property
    def kind(self) -> type[nn.Module] | None:
        """The class, if its library is imported: else no model has one."""
        module, _, name = self.target.partition(":")
        return getattr(sys.modules.get(module), name, None)


PATTERNS: dict[str, Pattern] = {}  # by target


def register_pattern(
    target: str, *, check: Check = _nothing, methods: Sequence[str] = ()
) -> Callable[[Forward], Forward]:
    """Decorates the forward of a pattern.

    Args:
        target: the class, "package.module:Name"; one that is known is replaced.
        check: of a module, None or why it is left: words that follow the module's name; "" where
            there is nothing to tell.
        methods: other methods that the class's forward calls and this one does not: a subclass with
            its own is left.

    Raises:
        ValueError: a target of another form.

    >>> import fastfuse
    >>> @fastfuse.register_pattern("my_models:Head")
    ... def head(self, x):
    ...     return self.conv(x)
    """
    module, colon, name = target.partition(":") if isinstance(target, str) else ("", "", "")
    if not (module and colon and name.isidentifier()):
        raise ValueError(f'register_pattern: target must be "package.module:Name"; got {target!r}')

    def register(forward: Forward) -> Forward:
        if not callable(forward):
            raise TypeError(f"register_pattern: expected a forward to decorate; got {forward!r}")
        PATTERNS[target] = Pattern(target, forward, check, tuple(methods))
        return forward

    return register


@cache
def as_forward_of(original: Forward, ours: Forward) -> Forward:
    """A pattern's forward while the class's is the original, and nothing else records the call."""

    @wraps(original)  # which torch.jit.script compiles
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).forward is not original or holds_proxies((args, tuple(kwargs.values()))):
            return type(self).forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    forward.__name__ = "forward"  # what is pickled is the module's attribute of this name
    return forward


def holds_proxies(value: Any) -> bool:
    """Whether torch.fx is to record what is done with arguments."""
    if isinstance(value, (list, tuple)):
        return any(holds_proxies(item) for item in value)
    return not isinstance(value, Tensor) and isinstance(value, Proxy)


def is_converted(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in CONVERTED


def kinds_of_patterns() -> dict[type, Pattern]:
    """The classes that are known, of the libraries that are imported."""
    return {kind: pattern for pattern in PATTERNS.values() if (kind := pattern.kind) is not None}


def pattern_of(
    module: nn.Module, kinds: Mapping[type, Pattern]
) -> tuple[Pattern, str | None] | None:
    """The pattern of a module's class, or of the nearest one that it derives from, and the reason
    to leave it, if there is one."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("fastfuse."):
            return None  # one of ours is what it would become
        if kind in kinds:
            pattern = kinds[kind]
            reason = (
                _own_method(module, pattern, kind)
                or _other_arguments(pattern, kind)
                or pattern.check(module)
            )
            return None if reason == "" else (pattern, reason)
    return None


def _own_method(module: nn.Module, pattern: Pattern, kind: type[nn.Module]) -> str | None:
    """Why what a module runs is not what its pattern was written for."""
    for name in ("forward", *pattern.methods):
        method = getattr(kind, name)
        if getattr(type(module), name) is not method:
            return f"is a {type(module).__qualname__}, with a {name} of its own"
        if method.__qualname__ not in [f"{base.__qualname__}.{name}" for base in kind.__mro__]:
            return f"is of a class whose {name} was replaced by {method.__qualname__}"
        own = module.__dict__.get(name, MethodType(method, module))
        if getattr(own, "__func__", None) is not method and not (
            name == "forward" and is_converted(module)
        ):
            return f"has a {name} of its own"
    return None


def _other_arguments(pattern: Pattern, kind: type[nn.Module]) -> str | None:
    """Another version of a library may take others, which its forward does something with."""
    theirs, ours = (list(signature(f).parameters)[1:] for f in (kind.forward, pattern.forward))
    passes_on = signature(pattern.forward).parameters.get("kwargs")
    if theirs == ours or (passes_on is not None and set(ours) <= {*theirs, "kwargs"}):
        return None
    return f"takes ({', '.join(theirs)}), where the pattern is of ({', '.join(ours)})"
