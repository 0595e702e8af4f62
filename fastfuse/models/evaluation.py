"""A model in evaluation mode for one caller, while others train it."""

from __future__ import annotations

import functools
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

__all__ = ["in_evaluation"]

_WAY_OUT = "; call the model's eval() before"
_BY_REFERENCE = ("_parameters", "_buffers")
_PLAIN = (type(None), bool, int, float, str)  # most attributes of modules


def in_evaluation(caller: str, model: nn.Module) -> nn.Module:
    """The model if all of its modules are in evaluation mode, else a copy that is.

    Nothing of the model changes, so that other threads may train it meanwhile. The copy's modules
    are objects of their own, whose ``training`` is False; parameters and buffers are the model's,
    in its own dicts, so that what FSDP or a swap puts there is seen. Attributes and hooks that
    refer to a module of the model (in lists and dicts, as bound methods, partials or closures, as
    a ``forward`` set on the instance does) refer to its copy. What a forward sets on its modules
    stays on the copy.

    DistributedDataParallel is left out, for its forward may wait for other ranks;
    ``torch.compile(module)`` stays compiled, ``module.compile()`` does not. A module's own
    ``train`` is not called.

    Raises:
        RuntimeError: a module that is no copy of this kind: TorchScript in training mode, one with
            a ``train`` set on the instance (exported programs), a lazy one that has not run, or
            one with an object that refers to modules of the model.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    >>> copy = in_evaluation("predict", model)
    >>> copy.training, model.training, copy[0].weight is model[0].weight
    (False, True, True)
    """
    if not any(module.training for module in model.modules()):
        return model
    return _Copies(caller, model).root


class _Copies:
    """Every module of a model with its copy, and whatever refers to the former, to the latter."""

    def __init__(self, caller: str, model: nn.Module) -> None:
        self.caller = caller
        self.copies: dict[int, nn.Module] = {}
        self.seen: dict[tuple[int, bool], tuple[Any, Any]] = {}  # values and what they became
        modules = dict(model.named_modules())
        for name, module in modules.items():
            self._check(name, module)
            scripted = isinstance(module, torch.jit.ScriptModule)
            self.copies[id(module)] = module if scripted else object.__new__(type(module))
        # From the leaves up, so that wrappers in wrappers end at what they wrap.
        for module in reversed(modules.values()):
            if isinstance(module, DistributedDataParallel):
                self.copies[id(module)] = self.copies[id(module.module)]
        for name, module in modules.items():
            if not isinstance(module, (torch.jit.ScriptModule, DistributedDataParallel)):
                self._fill(name, module, self.copies[id(module)])
        self.root = self.copies[id(model)]

    def _check(self, name: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            if module.training:
                self._refuse(name, "is TorchScript in training mode")
        elif "train" in vars(module) or "eval" in vars(module):
            self._refuse(name, "has a train() of its own, as exported programs have")
        elif isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            self._refuse(name, "is lazy and has not run yet")

    def _refuse(self, name: str, reason: str) -> None:
        raise RuntimeError(
            f"{self.caller}: a model in training mode is evaluated by a copy of its modules, and "
            f"{name or 'the model'} {reason}{_WAY_OUT}"
        )

    def _fill(self, name: str, module: nn.Module, copy: nn.Module) -> None:
        compiled = "_orig_mod" in module._modules  # torch._dynamo takes seconds to import
        state = dict(module.__getstate__()) if compiled else dict(vars(module))
        state.pop("_compiled_call_impl", None)
        for key, value in state.items():
            if key == "_modules":
                state[key] = {
                    k: None if child is None else self.copies[id(child)]
                    for k, child in value.items()
                }
            elif key not in _BY_REFERENCE:
                hooks = key.endswith("_hooks")
                state[key] = self._counterpart(value, None if hooks else f"{name}.{key}".strip("."))
        state["training"] = False
        if hasattr(module, "_get_fsdp_state"):  # fully_shard knows its modules by identity
            state["_get_fsdp_state"] = module._get_fsdp_state
        if compiled:
            copy.__setstate__(state)
        else:
            vars(copy).update(state)

    def _counterpart(self, value: Any, path: str | None) -> Any:
        """The value if it refers to no module of the model, else one that refers to the copies.

        ``path``: where an attribute is, for the refusal of objects that cannot be mapped; None:
        hooks, whose objects observe the model and are left alone.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        key = id(value), path is None
        if key not in self.seen:
            self.seen[key] = value, value  # where it refers to itself
            self.seen[key] = value, self._mapped(value, path)
        return self.seen[key][1]

    def _mapped(self, value: Any, path: str | None) -> Any:
        def of(inner: Any) -> Any:
            return self._counterpart(inner, path)

        if isinstance(value, (list, tuple, set, frozenset, dict)) and not value:
            return value

        def changed(before: Any, after: Any) -> bool:
            return any(a is not b for a, b in zip(before, after, strict=True))

        if isinstance(value, (list, tuple, set, frozenset)):
            before = list(value)
            items = [of(item) for item in before]
            if not changed(before, items):
                return value
            if isinstance(value, tuple) and hasattr(value, "_make"):
                return value._make(items)
            return type(value)(items)
        if isinstance(value, dict):
            before = list(value.values())
            items = [of(item) for item in before]
            if not changed(before, items):
                return value
            new = value.copy()
            new.update(zip(value, items, strict=True))
            return new
        if isinstance(value, MethodType):
            owner = of(value.__self__)
            return value if owner is value.__self__ else MethodType(of(value.__func__), owner)
        if isinstance(value, functools.partial):
            before = [value.func, *value.args, *value.keywords.values()]
            func, *rest = (of(item) for item in before)
            if not changed(before, [func, *rest]):
                return value
            count = len(value.args)
            keywords = dict(zip(value.keywords, rest[count:], strict=True))
            return functools.partial(func, *rest[:count], **keywords)
        if isinstance(value, FunctionType):
            return self._function(value, path)
        if isinstance(value, ReferenceType):
            target = value()
            mapped = self.copies.get(id(target), target)
            return value if mapped is target else ref(mapped)
        if path is not None and self._of_users(value):
            inner = list(vars(value).values())
            if changed(inner, [of(item) for item in inner]):
                kind = type(value).__name__
                self._refuse(path, f"is an object ({kind}) that refers to modules of the model")
        return value

    def _function(self, function: FunctionType, path: str | None) -> FunctionType:
        """A closure with cells of its own for what is mapped; others are shared."""
        cells = []
        for cell in function.__closure__ or ():
            try:
                before = cell.cell_contents
            except ValueError:  # an empty cell
                cells.append(cell)
                continue
            after = self._counterpart(before, path)
            cells.append(cell if after is before else CellType(after))
        if all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
            return function
        new = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        new.__kwdefaults__ = function.__kwdefaults__
        vars(new).update(vars(function))
        return new

    @staticmethod
    def _of_users(value: Any) -> bool:
        """An object whose attributes may be modules; PyTorch's own keep what they know there."""
        if isinstance(value, (Tensor, type, ModuleType)) or not hasattr(value, "__dict__"):
            return False
        return type(value).__module__.partition(".")[0] != "torch"
