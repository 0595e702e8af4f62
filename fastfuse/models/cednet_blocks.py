"""The blocks of a CEDNet, and what norm and activation go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from fastfuse.models.cednet_settings import Settings
from fastfuse.nn import CEDBlock, CSwinBlock, LayerNorm2d, LRCEDBlock, ResNetBlock, SwinBlock

__all__ = ["Blocks", "activation_of", "norm_of"]

_WINDOW, _SHIFT = 7, 3
_STRIPES = (1, 2, 7, 7)  # of c2 to c5

_LAST = 3  # the level whose blocks are long-range ones


def norm_of(block: str) -> Callable[[int], nn.Module]:
    return nn.BatchNorm2d if block == "resnet" else LayerNorm2d


def activation_of(block: str) -> Callable[[], nn.Module]:
    return nn.ReLU if block == "resnet" else nn.GELU


class Blocks:
    """Makes blocks of a level, 0 to 3 for c2 to c5, handing out the rates of stochastic depth one
    after the other."""

    def __init__(self, config: Settings, rates: Iterator[float]) -> None:
        self.config = config
        self.rates = rates

    def __call__(self, level: int, count: int) -> nn.Sequential:
        return nn.Sequential(*(self.one(level, next(self.rates), i) for i in range(count)))

    def one(self, level: int, rate: float = 0.0, index: int = 0) -> nn.Module:
        """``index``: its place among its neighbours of the same size."""
        config = self.config
        channels, recompute = config.channels[level], config.recompute
        long_range = level == _LAST and config.lr_blocks
        if config.block == "resnet":
            return ResNetBlock(channels, long_range=long_range, drop_path=rate)
        if config.block == "swin":
            return SwinBlock(
                channels,
                window=_WINDOW,
                shift=_SHIFT * (index % 2),
                long_range=long_range,
                drop_path=rate,
                recompute=recompute,
            )
        if config.block == "cswin":
            stripe = None if long_range else _STRIPES[level]
            return CSwinBlock(channels, stripe=stripe, drop_path=rate, recompute=recompute)
        make = LRCEDBlock if long_range else CEDBlock
        return make(
            channels,
            drop_path=rate,
            layer_scale=config.layer_scale,
            token_mixer=config.token_mixer,
            recompute=recompute,
        )
