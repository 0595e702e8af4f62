"""Calling an op's kernel from within its own autograd formula."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["below_autograd", "recording"]

# ``register_autograd`` makes an op's autograd kernel a Python function, which costs a call about
# 10 us even if nothing is recorded. Where it is known that nothing is, this goes past it, as that
# function itself does. The name is private to PyTorch: without it calls take the longer way.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def recording(wanted: bool) -> AbstractContextManager[object]:
    """A context for a call whose own derivative is wanted or not; compiled graphs keep the op."""
    return nullcontext() if wanted or torch.compiler.is_compiling() else below_autograd()
