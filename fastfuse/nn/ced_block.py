"""The blocks of CEDNet as modules; the plain one is ConvNeXt's too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.composition import Composition, Part, is_plain, leaf
from fastfuse.nn.conv2d import Conv2d, depthwise_dilation
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.nn.layer_norm import LayerNorm2d
from fastfuse.nn.stochastic_depth import check_drop_path, drawn_keep
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.ced_block import ced_block
from fastfuse.ops.ced_block.reference import scaled_and_added
from fastfuse.ops.checks import check_feature_map, check_ints
from fastfuse.ops.lr_ced_block import lr_ced_block

__all__ = ["CONVNEXT_KEYS", "CEDBlock", "LRCEDBlock", "TokenMixer", "conv3x3"]

_KERNEL, _EXPANSION = 7, 4

TokenMixer = Callable[[int], nn.Module]  # channels -> what keeps shape, dtype and device of images

# What a ConvNeXt block's parts are called: ours, then by where the weights come from.
CONVNEXT_KEYS: dict[str, dict[str, str]] = {
    "original": {
        "dw": "dwconv",
        "norm": "norm",
        "fc1": "pwconv1",
        "fc2": "pwconv2",
        "layer_scale": "gamma",
    },
    "timm": {
        "dw": "conv_dw",
        "norm": "norm",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "layer_scale": "gamma",
    },
    "transformers": {
        "dw": "dwconv",
        "norm": "layernorm",
        "fc1": "pwconv1",
        "fc2": "pwconv2",
        "layer_scale": "layer_scale_parameter",
    },
}


def conv3x3(channels: int) -> nn.Conv2d:
    """A dense 3x3 convolution that keeps channels and size, as a block's token mixer.

    Source: CEDNet, table 5.

    >>> import torch, fastfuse
    >>> block = fastfuse.nn.CEDBlock(8, token_mixer=fastfuse.nn.conv3x3)
    >>> block(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 9, 9])
    """
    return Conv2d(channels, channels, 3, padding=1)


_WEIGHT_AND_BIAS = ("weight", "bias")
_CONVOLUTIONS = (DepthwiseConv2d, Conv2d, nn.Conv2d)
NORM_PART = Part(
    (LayerNorm2d,),
    _WEIGHT_AND_BIAS,
    conditions={"eps above 0": lambda norm, weight, bias: norm.eps > 0},
)
_STEP = {
    "dw": Part(
        _CONVOLUTIONS,
        _WEIGHT_AND_BIAS,
        conditions={
            "one kernel a channel, undilated, that keeps the size": (
                lambda dw, weight, bias: depthwise_dilation(dw, weight) == 1
            )
        },
    ),
    "norm": NORM_PART,
}
_SECOND_STEP = {
    "dw2": Part(
        _CONVOLUTIONS,
        _WEIGHT_AND_BIAS,
        conditions={
            "one kernel a channel that keeps the size": (
                lambda dw, weight, bias: depthwise_dilation(dw, weight) is not None
            )
        },
    ),
    "norm2": NORM_PART,
}
MLP_PARTS = {name: Part((nn.Linear,), _WEIGHT_AND_BIAS) for name in ("fc1", "fc2")}


def depthwise(op: str, channels: int, dilation: int = 1) -> Conv2d:
    """7x7, with the constructor of nn.Conv2d, which adapters call again."""
    check_ints(op, 1, dilation=dilation)
    padding = dilation * (_KERNEL // 2)
    return Conv2d(channels, channels, _KERNEL, padding=padding, dilation=dilation, groups=channels)


class _Block(Composition):
    """Token mixer, layer norm, MLP, layer scale and stochastic depth.

    The op has the depthwise 7x7 convolution as its mixer, ``dw``; with another one, ``mixer``, the
    block is the composition of its children.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float,
        layer_scale: float | None,
        token_mixer: TokenMixer | None,
        recompute: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_ints(name, 1, channels=channels)
        check_drop_path(name, drop_path)
        if token_mixer is None:
            self.dw = depthwise(name, channels)
            self.mixer = None
        else:
            self.mixer = token_mixer(channels)
            if not isinstance(self.mixer, nn.Module):
                raise TypeError(
                    f"{name}: token_mixer must make a module from a number of channels; "
                    f"it gave {type(self.mixer).__name__}"
                )
        self.norm = LayerNorm2d(channels)
        self.fc1 = nn.Linear(channels, _EXPANSION * channels)
        self.fc2 = nn.Linear(_EXPANSION * channels, channels)
        self.layer_scale = (
            None
            if layer_scale is None
            else nn.Parameter(torch.full((channels,), float(layer_scale)))
        )
        self.drop_path = drop_path
        self.recompute = recompute

    def _keep(self, x: Tensor) -> Tensor | None:
        return drawn_keep(x, self.drop_path, self.training)

    def read_parts(self) -> list[Any] | str:
        if self.mixer is not None:
            return "a token mixer of its own"
        tensors = super().read_parts()
        if not isinstance(tensors, str):
            dtype = tensors[0].dtype
            scale = self._parameters.get("layer_scale")
            if scale is not None and not is_plain(scale):
                return f"layer_scale is a {type(scale).__name__}"
            for tensor in tensors if scale is None else (*tensors, scale):
                if tensor.dtype != dtype:  # norms in float32, say
                    return "parameters of several dtypes"
        return tensors

    def _mixed(self, x: Tensor) -> Tensor:
        """LN(mixer(x))."""
        if self.mixer is None:
            return self.norm(self.dw(x))
        mixed = self.mixer(x)
        if mixed.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: token_mixer must keep the shape {tuple(x.shape)}; "
                f"it gave {tuple(mixed.shape)}"
            )
        return self.norm(mixed)

    def _added(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x + keep * layer_scale * MLP(inputs)."""
        branch = self.fc2(F.gelu(self.fc1(inputs.permute(0, 2, 3, 1))))
        return scaled_and_added(x, branch, self.layer_scale, self._keep(x))

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"


class CEDBlock(_Block):
    """``x + keep * layer_scale * fc2(GELU(fc1(LN(DW 7x7(x)))))``: see ``fastfuse.ced_block``.

    8 C^2 + 58 C parameters with layer scale; keys ``dw.*``, ``norm.*``, ``fc1.*``, ``fc2.*``,
    ``layer_scale``.

    Args:
        channels: C; the MLP's hidden width is 4 C.
        drop_path: the rate of stochastic depth in training, in [0, 1), drawn for each sample.
        layer_scale: the initial value of gamma; None: there is none.
        token_mixer: channels -> a module that keeps (N, C, H, W), its dtype and its device, in
            place of the depthwise 7x7 convolution, e.g. ``fastfuse.nn.conv3x3`` or window
            attention; keys ``mixer.*`` instead of ``dw.*``, and plain PyTorch around it.
        recompute: as the op's: whether training keeps the input alone and computes the rest again.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a token_mixer that makes no module.
        ValueError: channels below 1, or drop_path outside [0, 1); a token_mixer whose result has
            another shape.

    >>> import torch, fastfuse
    >>> fastfuse.nn.CEDBlock(8, drop_path=0.1)(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 9, 9])
    """

    parts: ClassVar = {**_STEP, **MLP_PARTS}

    def __init__(
        self,
        channels: int,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        token_mixer: TokenMixer | None = None,
        recompute: bool = True,
    ) -> None:
        super().__init__(channels, drop_path, layer_scale, token_mixer, recompute)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        tensors = self.read_parts()
        if isinstance(tensors, str):
            check_feature_map("CEDBlock", "x", x)
            (x,) = cast_for_autocast([x])
            return self._added(x, self._mixed(x))
        return ced_block(  # type: ignore[misc]
            x,
            *tensors,
            layer_scale=self.layer_scale,
            keep=self._keep(x),
            eps=self.norm.eps,
            recompute=self.recompute,
        )

    def load_convnext(self, state_dict: Mapping[str, Tensor], source: str = "original") -> None:
        """Loads the weights of a ConvNeXt block, which is the same block.

        Args:
            state_dict: of that block alone, without a prefix; 1x1 convolutions count as linear.
            source: "original" (facebookresearch), "timm" or "transformers": see ``CONVNEXT_KEYS``.

        Raises:
            ValueError: an unknown source.
            RuntimeError: keys that are missing, left over or of another shape.

        >>> import torch, fastfuse
        >>> block = fastfuse.nn.CEDBlock(4)
        >>> timm = {"conv_dw.weight": torch.randn(4, 1, 7, 7), "conv_dw.bias": torch.zeros(4),
        ...         "norm.weight": torch.ones(4), "norm.bias": torch.zeros(4),
        ...         "mlp.fc1.weight": torch.randn(16, 4), "mlp.fc1.bias": torch.zeros(16),
        ...         "mlp.fc2.weight": torch.randn(4, 16), "mlp.fc2.bias": torch.zeros(4),
        ...         "gamma": torch.ones(4)}
        >>> block.load_convnext(timm, "timm")
        """
        if source not in CONVNEXT_KEYS:
            raise ValueError(
                f"CEDBlock: source must be one of {', '.join(CONVNEXT_KEYS)}; got {source!r}"
            )
        ours = {theirs: own for own, theirs in CONVNEXT_KEYS[source].items()}
        renamed = {}
        for key, value in state_dict.items():
            part, _, parameter = key.rpartition(".")
            name = ours.get(key) or (f"{ours[part]}.{parameter}" if part in ours else key)
            linear = name in ("fc1.weight", "fc2.weight") and value.dim() == 4
            renamed[name] = value.flatten(1) if linear else value
        self.load_state_dict(renamed)


class LRCEDBlock(_Block):
    """CEDNet's long-range block, with a second, dilated convolution: see ``fastfuse.lr_ced_block``.

    8 C^2 + 110 C parameters with layer scale; keys ``dw.*``, ``norm.*``, ``dw2.*``, ``norm2.*``,
    ``fc1.*``, ``fc2.*``, ``layer_scale``.

    Args:
        channels: C; the MLP's hidden width is 4 C.
        dilation: of the second convolution.
        drop_path: the rate of stochastic depth in training, in [0, 1), drawn for each sample.
        layer_scale: the initial value of gamma; None: there is none.
        token_mixer: as a CEDBlock's, in place of the first convolution.
        recompute: as a CEDBlock's.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: channels or dilation below 1, or drop_path outside [0, 1); a token_mixer whose
            result has another shape.

    >>> import torch, fastfuse
    >>> fastfuse.nn.LRCEDBlock(8)(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 9, 9])
    """

    parts: ClassVar = {**_STEP, **_SECOND_STEP, **MLP_PARTS}

    def __init__(
        self,
        channels: int,
        *,
        dilation: int = 3,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        token_mixer: TokenMixer | None = None,
        recompute: bool = True,
    ) -> None:
        super().__init__(channels, drop_path, layer_scale, token_mixer, recompute)
        self.dw2 = depthwise("LRCEDBlock", channels, dilation)
        self.norm2 = LayerNorm2d(channels)

    def read_parts(self) -> list[Any] | str:
        tensors = super().read_parts()
        if isinstance(tensors, str) or self.norm.eps == self.norm2.eps:
            return tensors
        return "norm2 has another eps than norm"

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        tensors = self.read_parts()
        if isinstance(tensors, str):
            check_feature_map("LRCEDBlock", "x", x)
            (x,) = cast_for_autocast([x])
            y = x + F.gelu(self._mixed(x))
            return self._added(x, y + F.gelu(self.norm2(self.dw2(y))))
        return lr_ced_block(  # type: ignore[misc]
            x,
            *tensors,
            layer_scale=self.layer_scale,
            keep=self._keep(x),
            dilation=self.dw2.dilation[0],
            eps=self.norm.eps,
            recompute=self.recompute,
        )
