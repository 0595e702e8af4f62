"""Published checkpoints into models, whole or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfuse.models.checkpoint_file import read_file

__all__ = ["load_checkpoint", "state_dict_of"]

_SHOWN = 5  # entries of what is no state dict


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    prefix: str = "",
    key: str | None = None,
) -> None:
    """Loads a checkpoint that fits exactly; one that does not leaves the model as it was.

    ``model.load_state_dict`` raises, too, but by then has copied whatever did fit.

    Args:
        model: what to load into.
        checkpoint: a file of safetensors or ``torch.save``, or what it holds: a state dict, alone
            or under the key "state_dict" or "model", as MMSegmentation and others write it. Files
            are read with ``weights_only=True``: what else they hold beside the weights (numpy's
            arrays, configurations, histories) is neither run nor loaded.
        prefix: of the keys to take, which is cut off, e.g. "backbone." or "decode_head.", or
            "module." of a model that was wrapped by DistributedDataParallel.
        key: of the state dict, if it is neither "state_dict" nor "model", e.g. "ema".

    Raises:
        OSError: the file cannot be opened.
        ValueError: a file that is no checkpoint, is damaged, or cannot be read without running what
            it holds; no state dict in it; no key with that prefix.
        RuntimeError: keys that are missing, unexpected, of another shape or refused: all listed,
            or the prefix with which they fit.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.FCNHead(8, 4, 3, num_convs=1, concat_input=False)
    >>> checkpoint = {"state_dict": {f"decode_head.{k}": v for k, v in head.state_dict().items()}}
    >>> fastfuse.models.load_checkpoint(head, checkpoint, prefix="decode_head.")
    """
    state = state_dict_of(checkpoint, key)
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
    except Exception as error:
        model.load_state_dict(before)
        wrapper = next(iter(chosen)).partition(".")[0] + "."
        if {wrapper + name for name in before} <= chosen.keys():
            raise RuntimeError(
                f"load_checkpoint: the model's keys stand under {wrapper!r} in this checkpoint; "
                f"pass prefix={prefix + wrapper!r}"
            ) from error
        raise


def state_dict_of(
    checkpoint: str | Path | Mapping[str, Any], key: str | None = None
) -> Mapping[str, Tensor]:
    """What a file or a mapping holds, as :func:`load_checkpoint` takes it."""
    source, stood_in = "checkpoint", False
    found: Any = checkpoint
    if isinstance(checkpoint, (str, Path)):
        source = str(checkpoint)
        found, stood_in = read_file(Path(checkpoint))
    strange = _strange(found, stood_in)
    if isinstance(found, Mapping) and key is not None and key not in found:
        listed = ", ".join(repr(k) for k in list(found)[:_SHOWN])
        raise ValueError(f"load_checkpoint: {source} has no key {key!r}; it has {listed}")
    if isinstance(found, Mapping) and (strange or key is not None):
        keys = ("state_dict", "model") if key is None else (key,)
        found = next((found[k] for k in keys if k in found), found)
        strange = _strange(found, stood_in)
    if not strange:
        return found
    raise ValueError(
        f"load_checkpoint: {source} must hold a state dict, alone or under the key 'state_dict' or "
        f"'model'; got {strange}. If it is elsewhere, pass key= or the state dict itself"
    )


def _strange(found: Any, stood_in: bool) -> str:
    """What keeps something from being a state dict, if anything."""
    if not isinstance(found, Mapping):
        return type(found).__name__
    if not found:
        return "an empty one"
    strange = [
        f"{key!r}: {type(value).__name__}"
        for key, value in found.items()
        if not (isinstance(key, str) and _is_state(key, value, stood_in))
    ]
    more = ["..."] if len(strange) > _SHOWN else []
    return f"a dict with other entries, {', '.join(strange[:_SHOWN] + more)}" if strange else ""


def _is_state(key: str, value: Any, stood_in: bool) -> bool:
    # In a file with stand-ins, an extra state that is no tensor may hold one.
    return isinstance(value, Tensor) or (key.endswith("_extra_state") and not stood_in)
