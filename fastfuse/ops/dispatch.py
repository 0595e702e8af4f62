"""Calling an op's kernel from within its own autograd formula."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["backward_of", "below_autograd", "recording"]

# ``register_autograd`` makes an op's autograd kernel a Python function, which costs a call about
# 10 us even if nothing is recorded. Where it is known that nothing is, this goes past it, as that
# function itself does. The name is private to PyTorch: without it calls take the longer way.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def recording(wanted: bool) -> AbstractContextManager[object]:
    """A context for a call whose own derivative is wanted or not; compiled graphs keep the op."""
    return nullcontext() if wanted or torch.compiler.is_compiling() else below_autograd()


class backward_of:  # noqa: N801 (used as a function)
    """A context for the calls of an op's backward: :func:`recording` if grad mode wants it, and an
    error that says what to do if gradients come batched."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.inner = recording(torch.is_grad_enabled())

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.inner.__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and "Batching rule" in str(error):
            raise RuntimeError(
                f"{self.op}: backward expects plain gradients, got batched ones (is_grads_batched, "
                f"vectorize); fastfuse.backend('reference') runs them"
            ) from error
