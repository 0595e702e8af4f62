"""Parameters, multiply-adds and the time of feature fusion, counted on models without weights.

What is counted stands beside what the papers have: ``derived`` is worked out by hand from their
descriptions (parameters to the last one, GFLOPs to a tenth), ``paper`` is as they print it, and
None where nobody knows it. Verdicts are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from plain_cednet import ConvNeXtFPN
from plain_cednet import RetinaNet as PlainRetinaNet
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from fastfuse.models import (
    CEDNet,
    CEDNetClassifier,
    DetectionFeatures,
    cednet_retinanet_base,
    cednet_retinanet_small,
    cednet_retinanet_tiny,
    cednet_upernet_base,
    cednet_upernet_small,
    cednet_upernet_tiny,
)

__all__ = [
    "DETECTION",
    "GFLOPS",
    "PARAMETERS",
    "Count",
    "FusionTime",
    "baseline_rows",
    "depth_rows",
    "executed_gflops",
    "flops_rows",
    "fusion_rows",
    "fusion_time",
    "paper_gflops",
    "parameter_count",
    "parameter_rows",
]

Make = Callable[[], nn.Module]
Shape = tuple[int, ...]

PARAMETERS, GFLOPS = "parameters", "GFLOPs"
GFLOPS_TOLERANCE = 0.005  # of what the paper prints
DERIVED_GFLOPS = 0.1  # what is derived has a tenth
DETECTION, SEGMENTATION = (1, 3, 800, 1280), (1, 3, 512, 2048)
MATCH, MISS, UNKNOWN = "match", "miss", "not known"
VARIANTS = {"tiny": "T", "small": "S", "base": "B"}
RETINANETS = {
    "tiny": cednet_retinanet_tiny,
    "small": cednet_retinanet_small,
    "base": cednet_retinanet_base,
}
UPERNETS = {
    "tiny": cednet_upernet_tiny,
    "small": cednet_upernet_small,
    "base": cednet_upernet_base,
}


# Rows


@dataclass(frozen=True)
class Count:
    """A number of a model beside the paper's.

    Args:
        quantity: PARAMETERS, counted one by one, or GFLOPS, 1e9 multiply-adds.
        paper: as printed, each with its own number of digits.
        executed: 1e9 multiply-adds that fused ops do, by their formulas.
    """

    model: str
    quantity: str
    ours: float
    derived: float | None = None
    paper: tuple[str, ...] = ()
    executed: float | None = None

    @property
    def difference(self) -> float | None:
        """From ``derived``, or without one from what is printed."""
        if self.derived is not None:
            return self.ours - self.derived
        if self.paper:
            return self.ours - _printed(self.paper[0])
        return None

    @property
    def verdict(self) -> str:
        """Parameters equal what is derived and round to what is printed; GFLOPs are within a tenth
        of what is derived and 0.5 % of what is printed."""
        known = [] if self.derived is None else [self.derived]
        if self.quantity == GFLOPS:
            agrees = [abs(self.ours - value) <= DERIVED_GFLOPS for value in known]
            agrees += [
                abs(self.ours - value) <= GFLOPS_TOLERANCE * value
                for value in map(_printed, self.paper)
            ]
        else:
            agrees = [self.ours == value for value in known]
            agrees += [_rounds_to(self.ours, text) for text in self.paper]
        if not agrees:
            return UNKNOWN
        return MATCH if all(agrees) else MISS

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "paper": list(self.paper),
            "difference": self.difference,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class FusionTime:
    """Parameters that have been used when levels are first fused, and all of them."""

    model: str
    before: int
    all: int

    @property
    def fraction(self) -> float:
        return self.before / self.all

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fraction": self.fraction}


def _printed(text: str) -> float:
    """The value of "39M" or "254.5"."""
    return float(text.removesuffix("M")) * (1e6 if text.endswith("M") else 1)


def _rounds_to(value: float, text: str) -> bool:
    digits = text.removesuffix("M")
    places = len(digits.partition(".")[2])
    return f"{value / (1e6 if text.endswith('M') else 1):.{places}f}" == digits


# Counting


def _on_meta(make: Make) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def parameter_count(make: Make) -> int:
    return sum(parameter.numel() for parameter in _on_meta(make).parameters())


class _Elements(TorchDispatchMode):
    """Counts what the papers' counter adds to multiply-adds, one for each element.

    These are biases added by convolutions, ReLUs, averaged elements, and twice those of batch
    norms, which scale and shift.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (name == "convolution" and args[2] is not None) or name in ("relu", "relu_"):
            self.count += output.numel()
        elif "batch_norm" in name:
            self.count += 2 * args[0].numel()
        elif name in ("_adaptive_avg_pool2d", "mean"):
            self.count += args[0].numel()
        return output


def paper_gflops(make: Make, shape: Shape) -> float:
    """1e9 multiply-adds and elements, as the papers count, of full-resolution computation."""
    model, images = _on_meta(make), torch.empty(shape, device="meta")
    counter, elements = FlopCounterMode(display=False), _Elements()
    with torch.no_grad(), fastfuse.backend("reference"), counter, elements:
        model(images)
    return (counter.get_total_flops() / 2 + elements.count) / 1e9


def executed_gflops(make: Make, shape: Shape) -> float:
    """1e9 multiply-adds by the formulas of the ops that run for CPU tensors; nothing is computed.

    Fused ops count what they do: a convolution of upsampled levels at their own sizes, a Winograd
    convolution's products, interpolation.
    """
    model, counter = _on_meta(make), FlopCounterMode(display=False)
    with FakeTensorMode(), torch.no_grad(), counter:
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        functional_call(model, weights, torch.empty(shape))
    return counter.get_total_flops() / 2e9


class _BeforeFusion(TorchFunctionMode):
    """Collects the parameters that functions take until the first one interpolates."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[int, Tensor] = {}
        self.fused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.fused = self.fused or getattr(func, "__name__", "") == "interpolate"
        if not self.fused:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    self.parameters[id(leaf)] = leaf
        return func(*args, **kwargs)


def fusion_time(name: str, make: Make) -> FusionTime:
    """Of a model whose first fusion is an upsampled map added to a finer one.

    Before it are all parameters used before the upsampling: the addition's two maps are ready, the
    coarser after its 1x1 convolution, the finer after its lateral block or convolution, if any.

    Raises:
        ValueError: a model that never upsamples.
    """
    model = _on_meta(make)
    with torch.no_grad(), fastfuse.backend("reference"), _BeforeFusion() as found:
        model(torch.empty(1, 3, 64, 64, device="meta"))
    if not found.fused:
        raise ValueError(f"fusion_time: expected a model that fuses levels; {name} never upsamples")
    before = sum(parameter.numel() for parameter in found.parameters.values())
    return FusionTime(name, before, sum(parameter.numel() for parameter in model.parameters()))


# The tables

_DERIVED_PARAMETERS: Mapping[str, tuple[int, int, int, int, int]] = {
    "tiny": (30_718_336, 30_967_776, 33_826_152, 38_635_380, 60_976_812),
    "small": (53_067_008, 53_316_448, 56_174_824, 60_984_052, 83_325_484),
    "base": (91_114_496, 91_546_688, 94_615_528, 99_121_652, 122_896_684),
}
_PAPER_RETINANET: Mapping[str, tuple[str, ...]] = {"tiny": ("39M", "38.6M"), "small": ("61M",)}
_PAPER_UPERNET = {"tiny": ("61M",), "small": ("83M",), "base": ("123M",)}

_STYLES: tuple[tuple[str, dict[str, Any], int | None, tuple[str, ...]], ...] = (
    ("UNet, last decoder", {"style": "unet"}, 38_884_820, ()),
    ("Hourglass, last decoder", {"style": "hourglass"}, 38_880_724, ()),
    ("FPN, no LR blocks", {"lr_blocks": False}, None, ("38.5M",)),
)

_BLOCKS = {  # of table 5: backbone, RetinaNet, and the latter as printed
    "resnet": ("R50-T", 31_541_376, 39_384_692, "39M"),
    "swin": ("Swin-T", 29_267_625, 37_135_517, "37M"),
    "cswin": ("CSwin-T", 25_739_200, 33_566_132, "33M"),
}

_DERIVED_GFLOPS = {  # and as printed
    "RetinaNet": {"tiny": (254.5, "255"), "small": (335.4, "335")},
    "UPerNet": {"tiny": (962.4, "962"), "small": (1045.2, "1045"), "base": (1184.3, "1184")},
}

# Stage by stage, at 1/8, 1/16 and 1/32; always 6, 12 and 6 blocks in all, as in CEDNet-T.
_DEPTHS: tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...] = (
    ("the paper's T", ((2, 4, 2),) * 3),
    ("more at first", ((2, 6, 2), (2, 4, 2), (2, 2, 2))),
    ("more at last", ((2, 2, 2), (2, 4, 2), (2, 6, 2))),
    ("more in the middle", ((2, 2, 2), (2, 8, 2), (2, 2, 2))),
    ("1/8 first, 1/32 last", ((3, 4, 1), (2, 4, 2), (1, 4, 3))),
    ("1/32 first, 1/8 last", ((1, 4, 3), (2, 4, 2), (3, 4, 1))),
    ("one stage", ((6, 12, 6),)),
    ("two stages", ((3, 6, 3),) * 2),
    ("six stages", ((1, 2, 1),) * 6),
)


def parameter_rows() -> Iterator[Count]:
    for variant, letter in VARIANTS.items():
        makes: Sequence[tuple[str, Make, tuple[str, ...]]] = (
            ("backbone, no last decoder", partial(CEDNet, variant), ()),
            ("backbone, last decoder", partial(CEDNet, variant, last_decoder=True), ()),
            ("classifier, 1 head", partial(CEDNetClassifier, variant, auxiliary_heads=False), ()),
            ("RetinaNet", RETINANETS[variant], _PAPER_RETINANET.get(variant, ())),
            ("UPerNet + auxiliary head", UPERNETS[variant], _PAPER_UPERNET[variant]),
        )
        for (name, make, paper), derived in zip(makes, _DERIVED_PARAMETERS[variant], strict=True):
            model = f"CEDNet-{letter}, {name}"
            yield Count(model, PARAMETERS, parameter_count(make), derived, paper)
    for name, options, derived, paper in _STYLES:
        count = parameter_count(partial(cednet_retinanet_tiny, **options))
        yield Count(f"CEDNet-T, RetinaNet: {name}", PARAMETERS, count, derived, paper)
    for block, (name, backbone, retinanet, printed) in _BLOCKS.items():
        count = parameter_count(partial(CEDNet, block=block))
        yield Count(f"CEDNet {name}, backbone", PARAMETERS, count, backbone)
        count = parameter_count(partial(cednet_retinanet_tiny, block=block))
        yield Count(f"CEDNet {name}, RetinaNet", PARAMETERS, count, retinanet, (printed,))


def flops_rows(progress: Callable[[str], None] = lambda text: None) -> Iterator[Count]:
    models: list[tuple[str, Make, Shape, tuple[float, str] | None]] = []
    for head, makes, shape in (
        ("RetinaNet", RETINANETS, DETECTION),
        ("UPerNet", UPERNETS, SEGMENTATION),
    ):
        for variant, letter in VARIANTS.items():
            known = _DERIVED_GFLOPS[head].get(variant)
            models.append((f"CEDNet-{letter}, {head}", makes[variant], shape, known))
    for name, options, _, _ in _STYLES:
        make = partial(cednet_retinanet_tiny, **options)
        models.append((f"CEDNet-T, RetinaNet: {name}", make, DETECTION, None))
    for name, make, shape, known in models:
        progress(f"counts {name}")
        yield Count(
            f"{name}, {shape[3]}x{shape[2]}",
            GFLOPS,
            paper_gflops(make, shape),
            known[0] if known else None,
            (known[1],) if known else (),
            executed_gflops(make, shape),
        )


def depth_rows() -> Iterator[Count]:
    """RetinaNet on CEDNet-T with blocks moved between stages: parameters, then GFLOPs, of each."""
    for name, stages in _DEPTHS:
        make = partial(cednet_retinanet_tiny, depths=(3, stages))
        model = f"{name}: 3; {' '.join(map(_triple, stages))}"
        default = stages == _DEPTHS[0][1]
        paper = _PAPER_RETINANET["tiny"] if default else ()
        yield Count(model, PARAMETERS, parameter_count(make), None, paper)
        paper = (_DERIVED_GFLOPS["RetinaNet"]["tiny"][1],) if default else ()
        yield Count(model, GFLOPS, paper_gflops(make, DETECTION), None, paper)


def _triple(depths: tuple[int, int, int]) -> str:
    return "-".join(map(str, depths))


def _convnext(variant: str) -> nn.Module:
    return PlainRetinaNet(ConvNeXtFPN(variant))


def baseline_rows() -> Iterator[Count]:
    """RetinaNet on ConvNeXt with FPN: parameters, then GFLOPs, of each variant."""
    for variant, letter in VARIANTS.items():
        model, make = f"ConvNeXt-{letter} + FPN, RetinaNet", partial(_convnext, variant)
        tiny = variant == "tiny"
        paper = ("38.76M",) if tiny else ()
        yield Count(model, PARAMETERS, parameter_count(make), None, paper)
        paper = ("243.1",) if tiny else ()
        yield Count(model, GFLOPS, paper_gflops(make, DETECTION), None, paper)


def fusion_rows() -> Iterator[FusionTime]:
    """Of what makes P3 to P7 of an image: CEDNet, in styles and depths; ConvNeXt with FPN."""
    for variant, letter in VARIANTS.items():
        yield fusion_time(f"CEDNet-{letter}", partial(_features, variant))
    for style in ("unet", "hourglass"):
        yield fusion_time(f"CEDNet-T, {style}", partial(_features, "tiny", style))
    for name, stages in _DEPTHS[1:]:
        if len(stages) == 1:  # has no decoder
            continue
        make = partial(_features, "tiny", depths=(3, stages))
        yield fusion_time(f"CEDNet-T, depths: {name}", make)
    for variant, letter in VARIANTS.items():
        yield fusion_time(f"ConvNeXt-{letter} + FPN", partial(ConvNeXtFPN, variant))


def _features(variant: str, style: str = "fpn", **cednet: Any) -> nn.Module:
    return DetectionFeatures(CEDNet(variant, style, **cednet))
