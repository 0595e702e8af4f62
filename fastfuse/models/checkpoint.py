"""Published checkpoints into models, whole or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_checkpoint", "state_dict_of"]


def load_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], *, prefix: str = ""
) -> None:
    """Loads a checkpoint that fits exactly; one that does not leaves the model as it was.

    ``model.load_state_dict`` raises, too, but by then has copied whatever did fit.

    Args:
        model: what to load into.
        checkpoint: a file (``.safetensors``, or what ``torch.save`` wrote, read with
            ``weights_only=True``), or what it holds: a state dict, alone or under the key
            "state_dict" or "model", as MMSegmentation and others write it.
        prefix: of the keys to take, which is cut off, e.g. "backbone." or "decode_head.".

    Raises:
        ValueError: no state dict in the checkpoint, or no key with that prefix.
        RuntimeError: keys that are missing, unexpected, of another shape or refused: all listed.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.FCNHead(8, 4, 3, num_convs=1, concat_input=False)
    >>> checkpoint = {"state_dict": {f"decode_head.{k}": v for k, v in head.state_dict().items()}}
    >>> fastfuse.models.load_checkpoint(head, checkpoint, prefix="decode_head.")
    """
    state = state_dict_of(checkpoint)
    chosen = OrderedDict(
        (key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)
    )
    if not chosen:
        listed = ", ".join(sorted({key.split(".")[0] for key in state}))
        raise ValueError(
            f"load_checkpoint: no key starts with prefix {prefix!r}; keys start with {listed}"
        )
    # Modules tell by these versions what an older state dict lacks.
    if versions := getattr(state, "_metadata", None):
        inside = {k.removeprefix(prefix): v for k, v in versions.items() if k.startswith(prefix)}
        if (own := prefix.removesuffix(".")) in versions:
            inside[""] = versions[own]
        chosen._metadata = inside  # type: ignore[attr-defined]
    before = model.state_dict()
    for key, value in before.items():
        before[key] = value.clone() if isinstance(value, Tensor) else deepcopy(value)
    try:
        model.load_state_dict(chosen)
    except Exception:
        model.load_state_dict(before)
        raise


def state_dict_of(checkpoint: str | Path | Mapping[str, Any]) -> Mapping[str, Tensor]:
    """What a file or a mapping holds, as :func:`load_checkpoint` takes it."""
    source = "checkpoint"
    if isinstance(checkpoint, (str, Path)):
        source = str(checkpoint)
        checkpoint = _read(Path(checkpoint))
    for _ in range(2):  # a state dict, perhaps inside another dict
        if not isinstance(checkpoint, Mapping):
            break
        if checkpoint and all(
            isinstance(value, Tensor) or key.endswith("_extra_state")
            for key, value in checkpoint.items()
        ):
            return checkpoint
        inner = (checkpoint[key] for key in ("state_dict", "model") if key in checkpoint)
        checkpoint = next(inner, None)  # type: ignore[assignment]
    raise ValueError(
        f"load_checkpoint: {source} must hold a state dict, alone or under the key 'state_dict' or "
        "'model'"
    )


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
