"""What is known of a class of another library: when, and how, this package runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from fastfuse.nn.composition import CONVERTED

__all__ = ["PATTERNS", "Pattern", "is_converted", "pattern_of", "register_pattern"]

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
        check: of a module, None or why it is left, as the end of a sentence.
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

    def own_method(self, module: nn.Module, kind: type[nn.Module]) -> str | None:
        """The first method that a module has otherwise than the class."""
        for name in ("forward", *self.methods):
            if getattr(type(module), name) is not getattr(kind, name):
                return name
        return next((name for name in self.methods if name in module.__dict__), None)


PATTERNS: dict[str, Pattern] = {}  # by target


def register_pattern(
    target: str, *, check: Check = _nothing, methods: Sequence[str] = ()
) -> Callable[[Forward], Forward]:
    """Decorates the forward of a pattern.

    Args:
        target: the class, "package.module:Name"; one that is known is replaced.
        check: of a module, None or why it is left: words that follow the module's name.
        methods: other methods that the class's forward calls and this one does not: a subclass with
            its own is left.

    Raises:
        ValueError: a target of another form.

    >>> import fastfuse
    >>> @fastfuse.register_pattern("my_models:Head")
    ... def head(self, x):
    ...     return self.conv(x)
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name.isidentifier()):
        raise ValueError(f'register_pattern: target must be "package.module:Name"; got {target!r}')

    def register(forward: Forward) -> Forward:
        # Its own function of that name: what is pickled is the attribute "forward" of the module.
        if isinstance(forward, FunctionType):
            forward.__name__ = "forward"
        PATTERNS[target] = Pattern(target, forward, check, tuple(methods))
        CONVERTED.add(forward)
        return forward

    return register


def is_converted(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in CONVERTED


def pattern_of(module: nn.Module) -> tuple[Pattern, str | None] | None:
    """The pattern of a module's class, or of the nearest that it derives from, and then whether
    that is a reason to leave it."""
    bases = type(module).__mro__
    known = [(bases.index(kind), p) for p in PATTERNS.values() if (kind := p.kind) in bases]
    if not known:
        return None
    nearest, pattern = min(known, key=lambda found: found[0])
    own = pattern.own_method(module, bases[nearest])
    if own is not None:
        return pattern, f"is a {type(module).__qualname__}, with a {own} of its own"
    if "forward" in module.__dict__ and not is_converted(module):
        bound = module.__dict__["forward"]
        if getattr(bound, "__func__", None) is not type(module).forward:
            return pattern, "has a forward of its own"
    return pattern, None
