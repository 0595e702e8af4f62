"""Scale equalizers folded into the weights that follow them."""

from __future__ import annotations

import torch
from torch import nn

from fastfuse.calibration.equalizers import find_equalizers, find_fusions, unwrap

__all__ = ["fold_scale_equalizers"]


def fold_scale_equalizers(model: nn.Module, *, keep_mean: bool = True) -> list[str]:
    """Divides each branch's weights by its std: ``w_i <- w_i / std_i``, and std becomes 1.

    ``keep_mean=True`` keeps the equalizers, for their means. Outputs stay as they were, at the
    zero-padded border too, and a mean costs nothing in ``fusion_conv2d``. What changes is training
    from here on: gradients of the weights are those of branches that are not equalized.

    ``keep_mean=False`` is the auxiliary initializer of *Scale Equalization for Multi-Level Feature
    Fusion* (section on its cost): the equalizers go (``fusion.equalizer = None``), and with them
    their keys in the state dict. Every fusion computes conv(x / std). A normalization in training
    mode takes away what the means contributed, except where a kernel larger than 1x1 meets the zero
    padding: there results differ. To be used before training, not after.

    Equalizers that are not calibrated fold as what they are, the identity. A folded model is not to
    be calibrated again: its weights would be divided twice.

    Args:
        model: with equalizers; changed in place.
        keep_mean: see above.

    Returns:
        The equalizers' names, as in :func:`fastfuse.calibrate`.

    Raises:
        ValueError: a model without equalizers, equalizers that no fusion owns, a weight or an
            equalizer that two fusions share, a convolution that is adapted or whose weight is
            computed, or not finite once divided. Then nothing has changed.

    >>> import torch, fastfuse
    >>> fusion = fastfuse.nn.MultiLevelFusion([8, 8], 16, scale_equalizer=True).eval()
    >>> fusion.equalizer.set_statistics(mean=[0.4, 0.4], std=[0.6, 0.5])
    >>> levels = [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    >>> before = fusion(levels)
    >>> fastfuse.fold_scale_equalizers(fusion)
    ['equalizer']
    >>> torch.allclose(fusion(levels), before, atol=1e-5), fusion.equalizer.std.tolist()
    (True, [1.0, 1.0])
    """
    caller = "fold_scale_equalizers"
    model = unwrap(model)
    names = {id(module): name for name, module in find_equalizers(model).items()}
    if not names:
        raise ValueError(
            f"{caller}: the model has no scale equalizers; build its fusions or heads with "
            f"scale_equalizer=True"
        )
    owners = {n: f for n, f in find_fusions(model).items() if f.equalizer is not None}
    alone = names.keys() - {id(fusion.equalizer) for fusion in owners.values()}
    if alone:
        raise ValueError(
            f"{caller}: equalizers must belong to a fusion, whose weight they are folded into; "
            f"these stand alone: {sorted(names[key] for key in alone)}"
        )
    seen: dict[int, str] = {}
    for name, fusion in owners.items():
        if (problem := fusion.fold_problem()) is not None:
            raise ValueError(f"{caller}: fusion {name!r}: {problem}")
        weight = fusion.level_weight
        for shared in (weight, fusion.equalizer):
            if id(shared) in seen:
                raise ValueError(
                    f"{caller}: fusions {seen[id(shared)]!r} and {name!r} share a "
                    f"{type(shared).__name__}, which cannot be folded twice"
                )
            seen[id(shared)] = name
        assert fusion.equalizer is not None
        smallest = fusion.equalizer.std.min()
        largest = (weight.detach().abs().max().double() / smallest.double()).to(weight.dtype)
        if not torch.isfinite(largest):
            raise ValueError(
                f"{caller}: the weight of fusion {name!r} divided by its std must be finite in "
                f"{weight.dtype}; got a smallest std of {float(smallest):.3g}"
            )
    folded = [names[id(fusion.equalizer)] for fusion in owners.values()]
    for fusion in owners.values():
        fusion.fold_equalizer(keep_mean=keep_mean)
    return folded
