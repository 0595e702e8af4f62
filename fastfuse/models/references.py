"""Values that refer to modules, and the same values referring to copies of those."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

__all__ = ["References"]

_PLAIN = (type(None), bool, int, float, str)  # most attributes of modules
_SEQUENCES = (list, tuple, set, frozenset, deque)


class References:
    """Finds the counterparts of values.

    Containers, methods, partials, weak references, closures and default arguments are made anew
    where they refer to a module that has a copy. Other objects are not copied, for they may keep
    what they are called for: they are refused where they refer to one. Of a hook only what its code
    can reach counts: the modules that it names as globals or as attributes of the objects it holds.

    Args:
        copies: by ``id`` of the module.
        refuse: raises, of a path and what is there.
    """

    def __init__(self, copies: Mapping[int, nn.Module], refuse: Callable[[str, str], None]) -> None:
        self.copies = copies
        self.refuse = refuse
        self.seen: dict[tuple[int, bool], tuple[Any, Any]] = {}  # values and what they became
        self.checked: dict[tuple[int, int], tuple[Any, Any]] = {}  # functions and their objects

    def counterpart(self, value: Any, path: str, *, hook: bool = False) -> Any:
        """The value if it refers to no module with a copy, else one that refers to the copies.

        ``path``: where it is, for refusals; ``hook``: whether it is one, or hooks.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        key = id(value), hook
        if key not in self.seen:
            self.seen[key] = value, value  # where it refers to itself
            self.seen[key] = value, self._mapped(value, path, hook)
        return self.seen[key][1]

    def _mapped(self, value: Any, path: str, hook: bool) -> Any:
        def of(*inner: Any) -> list[Any] | None:
            """The counterparts, or None if all of them are what they were."""
            found = [self.counterpart(item, path, hook=hook) for item in inner]
            return found if any(a is not b for a, b in zip(found, inner, strict=True)) else None

        if isinstance(value, dict):
            items = of(*value, *value.values())
            if items is None:
                return value
            new = value.copy()
            new.clear()
            new.update(zip(items[: len(value)], items[len(value) :], strict=True))
            return new
        if isinstance(value, _SEQUENCES):
            items = of(*value)
            if items is None:
                return value
            if isinstance(value, deque):
                return type(value)(items, value.maxlen)
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
        if isinstance(value, ReferenceType):
            target = value()
            mapped = self.copies.get(id(target), target)
            return value if mapped is target else ref(mapped)
        if isinstance(value, functools.partial):
            items = of(value.func, *value.args, *value.keywords.values())
            if items is None:
                return value
            func, *rest = items
            count = len(value.args)
            keywords = dict(zip(value.keywords, rest[count:], strict=True))
            return functools.partial(func, *rest[:count], **keywords)
        if isinstance(value, MethodType):
            owner = value.__self__
            if hook and not isinstance(owner, nn.Module):
                self._check_code(value.__func__, path, [owner])
                return value
            items = of(value.__func__, owner)
            return value if items is None else MethodType(*items)
        if isinstance(value, FunctionType):
            return self._function(value, path, hook)
        if not _is_object(value):
            return value
        if hook:
            if callable(value):
                self._check_code(type(value).__call__, path, [value])
        elif of(*_attributes(value).values()) is not None:
            self.refuse(path, f"is an object ({type(value).__name__}) that refers to modules of it")
        return value

    def _function(self, function: FunctionType, path: str, hook: bool) -> FunctionType:
        """With cells and defaults of its own where something is mapped."""
        cells = [cell for cell in function.__closure__ or () if _holds(cell)]
        contents = [cell.cell_contents for cell in cells]
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._check_code(function, path, [*contents, *defaults])
        new_contents, defaults, named = (
            self.counterpart(inner, path, hook=hook)
            for inner in (contents, function.__defaults__, function.__kwdefaults__)
        )
        if (
            new_contents is contents
            and defaults is function.__defaults__
            and named is function.__kwdefaults__
        ):
            return function
        changed = {
            id(cell): CellType(after)
            for cell, before, after in zip(cells, contents, new_contents, strict=True)
            if after is not before
        }
        new = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            defaults,
            tuple(changed.get(id(cell), cell) for cell in function.__closure__ or ()),
        )
        new.__kwdefaults__ = named
        vars(new).update(vars(function))
        return new

    def _check_code(self, function: Any, path: str, objects: Iterable[Any]) -> None:
        """Refuses a function whose code names a module that has a copy: a global, or an attribute
        of a global or of an object that it holds; and so the functions of its file and the methods
        that it names."""
        if not isinstance(function, FunctionType) or _is_torchs(function):
            return
        held = [item for item in objects if _is_object(item)]
        if not self._enter(function, held):
            return
        names = _names(function.__code__)
        found = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
        for name, value in found.items():
            if isinstance(value, FunctionType):
                if value.__globals__ is function.__globals__:
                    self._check_code(value, path, held)
            elif self._refers(value, path):
                self._refuse_name(path, function, name)
        for item in [*held, *(v for v in found.values() if _is_object(v, modules=True))]:
            attributes = _attributes(item)
            for name in names:
                if name in attributes and self._refers(attributes[name], path):
                    self._refuse_name(path, function, name)
                method = getattr(type(item), name, None)
                method = method.fget if isinstance(method, property) else method
                self._check_code(method, path, [item])

    def _enter(self, function: FunctionType, held: list[Any]) -> bool:
        keys = {(id(function), id(item)): (function, item) for item in [None, *held]}
        new = keys.keys() - self.checked.keys()
        self.checked.update(keys)
        return bool(new)

    def _refers(self, value: Any, path: str) -> bool:
        return self.counterpart(value, path, hook=True) is not value

    def _refuse_name(self, path: str, function: FunctionType, name: str) -> None:
        what = f"{function.__qualname__}, which reaches modules of it by {name}"
        self.refuse(path, f"has {what}")


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _holds(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_torchs(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


def _is_object(value: Any, *, modules: bool = False) -> bool:
    """Something whose attributes may be modules; PyTorch's own keep what they know there."""
    if isinstance(value, ModuleType):
        return modules and value.__name__.partition(".")[0] != "torch"
    return not isinstance(value, (*_PLAIN, Tensor, type, nn.Module, FunctionType)) and not (
        _is_torchs(type(value))
    )


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    return found
