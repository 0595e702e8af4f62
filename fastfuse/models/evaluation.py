"""A model in evaluation mode for one caller, while others train it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from fastfuse.models.references import References

__all__ = ["in_evaluation"]

_WAY_OUT = "; call the model's eval() before"
_BY_REFERENCE = ("_parameters", "_buffers")


def in_evaluation(caller: str, model: nn.Module) -> nn.Module:
    """The model if all of its modules are in evaluation mode, else a copy that is.

    Nothing of the model changes, so that other threads may train it meanwhile. The copy's modules
    are objects of their own, whose ``training`` is False; parameters and buffers are the model's,
    in its own dicts, so that what FSDP or a swap puts there is seen. Attributes and hooks that
    refer to a module of the model (in lists and dicts, as bound methods, partials, closures or
    default arguments, as a ``forward`` set on the instance does) refer to its copy. What a forward
    sets on its modules stays on the copy.

    DistributedDataParallel is left out, for its forward may wait for other ranks;
    ``torch.compile(module)`` stays compiled, ``module.compile()`` does not. A module's own
    ``train`` is not called.

    Raises:
        RuntimeError: a module that is no copy of this kind: TorchScript in training mode, one with
            a ``train`` set on the instance (exported programs), a lazy one that has not run, one
            with an object that refers to modules of the model, or with a hook whose code names one.

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
        self.references = References(self.copies, self._refuse)
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
                path, hook = f"{name}.{key}".strip("."), key.endswith("_hooks")
                state[key] = self.references.counterpart(value, path, hook=hook)
        state["training"] = False
        if hasattr(module, "_get_fsdp_state"):  # fully_shard knows its modules by identity
            state["_get_fsdp_state"] = module._get_fsdp_state
        if compiled:
            copy.__setstate__(state)
        else:
            vars(copy).update(state)
