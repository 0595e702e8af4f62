"""Stochastic depth: branches that training leaves out at random."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_drop_path", "drawn_keep"]


def check_drop_path(op: str, drop_path: float) -> None:
    if not isinstance(drop_path, (int, float)):
        raise TypeError(f"{op}: drop_path must be a number; got {type(drop_path).__name__}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"{op}: drop_path must be in [0, 1); got {drop_path}")


def drawn_keep(x: Tensor, drop_path: float, training: bool) -> Tensor | None:
    """A factor per sample, drawn once: backward computes a branch again with the same."""
    if not training or drop_path == 0:
        return None
    kept = 1 - drop_path
    factor = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
    return factor.bernoulli_(kept).div_(kept)
