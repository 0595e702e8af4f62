"""UPerNet on CEDNet, with the auxiliary head of the paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastfuse.heads import FCNHead, UPerHead
from fastfuse.models.cednet import CEDNet
from fastfuse.models.segmentor import Segmentor

__all__ = ["cednet_upernet_base", "cednet_upernet_small", "cednet_upernet_tiny"]

_AUXILIARY_CHANNELS = 256


class CEDNetSegmentor(Segmentor):
    """A segmentor whose auxiliary head reads decoded_c3 of the last stage but one."""

    backbone: CEDNet

    def training_features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = self.backbone(images, stages=True)
        auxiliary = outputs[-2].decoded_c3
        assert auxiliary is not None  # every stage but the last decodes
        return list(CEDNet.last_maps(outputs)), auxiliary


def _upernet(variant: str, num_classes: int, cednet: dict[str, Any]) -> Segmentor:
    backbone = CEDNet(variant, **{"layer_scale": 1.0, **cednet})
    if len(backbone.stages) < 2:
        raise ValueError(
            f"cednet_upernet_{variant}: stages must be at least 2, for the auxiliary head reads "
            "the last one but one; got 1"
        )
    auxiliary = FCNHead(
        backbone.channels[1], _AUXILIARY_CHANNELS, num_classes, num_convs=1, concat_input=False
    )
    return CEDNetSegmentor(
        backbone, UPerHead(backbone.channels, num_classes=num_classes), auxiliary
    )


def cednet_upernet_tiny(num_classes: int = 150, **cednet: Any) -> Segmentor:
    """UPerNet on CEDNet-T with an auxiliary head, 60,976,812 parameters.

    ``cednet``: see :class:`CEDNet`; layer_scale is 1 by default, as in the paper's segmentation.

    >>> import torch, fastfuse
    >>> model = fastfuse.models.cednet_upernet_tiny(5, depths=(1, 1, 1, 1))
    >>> model.eval()(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 5, 64, 64])
    """
    return _upernet("tiny", num_classes, cednet)


def cednet_upernet_small(num_classes: int = 150, **cednet: Any) -> Segmentor:
    """UPerNet on CEDNet-S with an auxiliary head, 83,325,484 parameters; else as tiny's."""
    return _upernet("small", num_classes, cednet)


def cednet_upernet_base(num_classes: int = 150, **cednet: Any) -> Segmentor:
    """UPerNet on CEDNet-B with an auxiliary head, 122,896,684 parameters; else as tiny's."""
    return _upernet("base", num_classes, cednet)
