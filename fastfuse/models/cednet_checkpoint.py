"""Checkpoints of CEDNet with the names of its authors' code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastfuse.models.cednet import CEDNet, Decoder, Stage
from fastfuse.models.cednet_classifier import CEDNetClassifier
from fastfuse.models.checkpoint import load_checkpoint, state_dict_of
from fastfuse.models.detection import DetectionFeatures, RetinaNet
from fastfuse.models.segmentor import Segmentor
from fastfuse.nn import CONVNEXT_KEYS, CEDBlock, LRCEDBlock

__all__ = ["load_published_cednet"]

Names = dict[str, str]  # a module's part: what the authors call it, both as paths

_BLOCK = CONVNEXT_KEYS["original"]


def _backbone(model: CEDNet) -> Names:
    """The stem's blocks are the authors' first stage, with the step to 1/8 as its last entry."""
    depth, count = len(model.blocks), len(model.stages)
    return {
        "stem": "stem",
        "blocks": "stages.0",
        "downsample": f"stages.0.{depth}",
        **{f"stages.{i}": f"stages.{i + 1}" for i in range(count)},
    }


def _classifier(model: CEDNetClassifier) -> Names:
    first, names = _first_head(model), {"backbone": ""}
    for i in range(len(model.heads)):
        parts = {"expand": "final_layers", "norm": "norms", "linear": "heads"}
        names |= {f"heads.{i}.{ours}": f"{name}.{first + i}" for ours, name in parts.items()}
    return names


def _first_head(model: CEDNetClassifier) -> int:
    return len(model.backbone.stages) - len(model.heads)


# Inside of any other module the names are the same.
_NAMES: dict[type[nn.Module], Callable[[Any], Names]] = {
    CEDNet: _backbone,
    Stage: lambda _: {"encoder": "0.encoder", "downsample": "0.encoder_downsample", "decoder": "1"},
    Decoder: lambda _: {
        "lateral": "lateral",
        "reduce.0": "decoder_upsample.0.0",
        "reduce.1": "decoder_upsample.1.0",
        "norm": "decoder_norm",
        "blocks": "decoder",
    },
    CEDBlock: lambda _: _BLOCK,
    LRCEDBlock: lambda _: {
        **_BLOCK,
        "dw": "dwconv1.0",
        "norm": "dwconv1.1",
        "dw2": "dwconv2.0",
        "norm2": "dwconv2.1",
    },
    CEDNetClassifier: _classifier,
    DetectionFeatures: lambda _: {
        "backbone": "",
        "reduce": "reduce_convs",
        "extra": "add_blocks",
        "lateral": "reduce_c2",
        "merge": "merge_c2",
    },
    RetinaNet: lambda _: {"backbone": "backbone", "bbox_head": "bbox_head"},
    Segmentor: lambda _: {name: name for name in ("backbone", "decode_head", "auxiliary_head")},
    nn.Sequential: lambda parts: {name: str(i) for i, name in enumerate(parts._modules)},
    nn.ModuleList: lambda parts: {str(i): str(i) for i in range(len(parts))},
}


def _left_out(model: nn.Module) -> str:
    """Which published keys a model has no use for, as a regular expression."""
    if isinstance(model, CEDNet):
        return r"(final_layers|norms|heads)\.\d+\."
    if isinstance(model, CEDNetClassifier):
        unused = "|".join(map(str, range(_first_head(model))))
        return rf"(final_layers|norms|heads)\.({unused})\." if unused else r"(?!)"
    if isinstance(model, DetectionFeatures):
        return r"(bbox|rpn|roi)_head\."
    return r"(?!)"  # none


def load_published_cednet(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> None:
    """Loads a checkpoint that has the names of the authors' code, whole or not at all.

    What a model takes, and of it all but what is named here:

    - :class:`CEDNet`: their classifier's checkpoint without its heads, or a backbone's alone;
    - :class:`CEDNetClassifier`: their classifier's checkpoint; without auxiliary heads, no head but
      the last one;
    - :class:`DetectionFeatures`: their detector's (MMDetection) without its ``bbox_head``,
      ``rpn_head`` and ``roi_head``;
    - :class:`RetinaNet` and :class:`Segmentor`: their detector's and segmentor's (MMDetection,
      MMSegmentation).

    Dense prediction starts from a classifier: load its checkpoint into the CEDNet inside the model.
    The classifier's last stage has no decoder, so that last_decoder must be False.

    Args:
        model: one of these, with a CEDNet inside; styles, depths and channels as they were trained.
        checkpoint: a file or what it holds, as :func:`load_checkpoint` takes it.

    Raises:
        TypeError: another model.
        ValueError: no state dict in the checkpoint.
            A model with other blocks than "next", or with a token_mixer: their names are not known.
        RuntimeError: keys that are missing or unexpected (all listed, by the authors' names), of
            another shape or refused (by ours). The model is as it was.

    Source: the published code (github.com/zhanggang001/CEDNet), whose names these are; no
    checkpoint was published with it as far as is known.

    >>> import torch, fastfuse
    >>> model = fastfuse.models.CEDNet("tiny")
    >>> part = {"stem.0.weight": torch.zeros(32, 3, 3, 3), "stem.0.bias": torch.zeros(32)}
    >>> fastfuse.models.load_published_cednet(model, part)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    RuntimeError: load_published_cednet: missing keys: stages.0.0.dwconv.bias, ...
    """
    kinds = (CEDNet, CEDNetClassifier, DetectionFeatures, RetinaNet, Segmentor)
    if not (isinstance(model, kinds) and any(isinstance(m, CEDNet) for m in model.modules())):
        raise TypeError(
            "load_published_cednet: model must be a CEDNet, or a CEDNetClassifier, "
            f"DetectionFeatures, RetinaNet or Segmentor on one; got {type(model).__name__}"
        )
    others = {m.block for m in model.modules() if isinstance(m, CEDNet)} - {"next"}
    if others:
        raise ValueError(
            "load_published_cednet: model must have block next, whose names are known; "
            f"got block {', '.join(sorted(others))}"
        )
    if any(getattr(module, "mixer", None) is not None for module in model.modules()):
        raise ValueError(
            "load_published_cednet: model must have the depthwise token mixer; the names of others "
            "are not known"
        )
    outer = "backbone" if isinstance(model, DetectionFeatures) else ""
    ours = dict(_keys(model, theirs=outer))
    left_out = re.compile(_left_out(model))
    found = {k: v for k, v in state_dict_of(checkpoint).items() if not left_out.match(k)}
    faults = {"missing": ours.keys() - found.keys(), "unexpected": found.keys() - ours.keys()}
    if any(faults.values()):
        listed = "; ".join(f"{k} keys: {', '.join(sorted(v))}" for k, v in faults.items() if v)
        prefixes = {key.split(".")[0] for key in found}
        hint = f" (every key starts with {prefixes.pop()!r})" if len(prefixes) == 1 else ""
        raise RuntimeError(f"load_published_cednet: {listed}{hint}")
    load_checkpoint(model, {ours[key]: value for key, value in found.items()})


def _keys(part: Any, ours: str = "", theirs: str = "") -> Iterator[tuple[str, str]]:
    """The authors' key and ours of every tensor of a module."""
    if not isinstance(part, nn.Module):
        yield theirs, ours
        return
    names = next((names for kind, names in _NAMES.items() if isinstance(part, kind)), None)
    if names is None:
        yield from ((_path(theirs, key), _path(ours, key)) for key in part.state_dict())
        return
    for own, name in names(part).items():
        inner: Any = part
        for step in own.split("."):
            inner = getattr(inner, step, None)
        if inner is not None:
            yield from _keys(inner, _path(ours, own), _path(theirs, name))


def _path(*steps: str) -> str:
    return ".".join(filter(None, steps))
