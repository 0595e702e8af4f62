"""What people do to the modules of a model, each as a function of a model, a name in it and a seed.

Applied to a model of the package and to its plain composition with the same keys, a treatment must
do the same to both. ``True`` says that it applied; a child that was treated before may not take it.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["TREATMENTS", "Treatment", "treatable"]

Treatment = Callable[[nn.Module, str, random.Random], bool]


def treatable(model: nn.Module) -> list[str]:
    """Names of the convolutions, linear layers and norms, as they are before any treatment."""
    return [
        name
        for name, module in model.named_modules()
        if name and not list(module.children()) and dict(module.named_parameters(recurse=False))
    ]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _products(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear)) and _weight(module)


# ---- hooks ----


def forward_hook(model: nn.Module, name: str, rng: random.Random) -> bool:
    factor = rng.uniform(0.5, 1.5)
    model.get_submodule(name).register_forward_hook(lambda module, x, y: y * factor)
    return True


def forward_pre_hook(model: nn.Module, name: str, rng: random.Random) -> bool:
    factor = rng.uniform(0.5, 1.5)
    model.get_submodule(name).register_forward_pre_hook(lambda module, x: (x[0] * factor,))
    return True


def backward_hook(model: nn.Module, name: str, rng: random.Random) -> bool:
    factor = rng.uniform(0.5, 1.5)
    # An in-place ReLU after a view that the hook makes is an error of PyTorch's, for plain models.
    if isinstance(model.get_submodule(name), nn.BatchNorm2d):
        return False
    model.get_submodule(name).register_full_backward_hook(
        lambda module, grad_in, grad_out: tuple(g if g is None else g * factor for g in grad_in)
    )
    return True


def patched_forward(model: nn.Module, name: str, rng: random.Random) -> bool:
    """As accelerate does."""
    module, factor = model.get_submodule(name), rng.uniform(0.5, 1.5)
    forward = module.forward
    module.forward = lambda x: forward(x) * factor  # type: ignore[method-assign]
    return True


# ---- weights ----


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def pruned(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _products(module):
        return False
    prune.l1_unstructured(module, "weight", rng.uniform(0.1, 0.6))
    return True


def pruned_for_good(model: nn.Module, name: str, rng: random.Random) -> bool:
    if not pruned(model, name, rng):
        return False
    prune.remove(model.get_submodule(name), "weight")
    return True


def parametrized(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _weight(module):
        return False
    parametrize.register_parametrization(module, "weight", Scaled(rng.uniform(0.5, 1.5)))
    return True


def weight_norm(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _products(module):
        return False
    if rng.random() < 0.5:
        parametrizations.weight_norm(module)
    else:
        torch.nn.utils.weight_norm(module)
    return True


def frozen(model: nn.Module, name: str, rng: random.Random) -> bool:
    for parameter in model.get_submodule(name).parameters():
        parameter.requires_grad_(False)
    return True


def without_bias(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _products(module):
        return False
    module.bias = None
    return True


def with_bias(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _products(module) or module.bias is not None:
        return False
    values = [rng.uniform(-1, 1) for _ in range(module.weight.shape[0])]
    module.bias = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return True


def weight_as_tensor(model: nn.Module, name: str, rng: random.Random) -> bool:
    """A computed weight in the parameter's place, as hypernetworks do."""
    module = model.get_submodule(name)
    if not _weight(module):
        return False
    weight = module.weight.detach() * rng.uniform(0.5, 1.5)
    del module.weight
    module.weight = weight
    return True


# ---- modules ----


class Adapter(nn.Module):
    """LoRA of a linear layer or a convolution."""

    def __init__(self, base: nn.Module, rng: random.Random) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        options = {"generator": generator, "dtype": torch.float64}
        self.a = nn.Parameter(torch.randn(2, *base.weight.shape[1:], **options))
        self.b = nn.Parameter(torch.randn(base.weight.shape[0], 2, **options) / 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("or,r...->o...", self.b, self.a)
        if isinstance(self.base, nn.Linear):
            return self.base(x) + F.linear(x, weight)
        c = self.base
        return c(x) + F.conv2d(x, weight, None, c.stride, c.padding, c.dilation, c.groups)


def adapted(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not _products(module) or (isinstance(module, nn.Conv2d) and module.padding_mode != "zeros"):
        return False
    replace(model, name, Adapter(module, rng))
    return True


def subclassed(model: nn.Module, name: str, rng: random.Random) -> bool:
    """By a class of its own, with another forward."""
    module, factor = model.get_submodule(name), rng.uniform(0.5, 1.5)
    kind = type(module)
    if "forward" in module.__dict__:
        return False

    class Subclass(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * factor

    module.__class__ = Subclass
    return True


def fused_batch_norm(model: nn.Module, name: str, rng: random.Random) -> bool:
    """The convolution before a batch norm takes it up, as every deployment does."""
    parent = name.rpartition(".")[0]
    unit = model.get_submodule(parent)
    conv, bn = getattr(unit, "conv", None), getattr(unit, "bn", None)
    if unit.training or type(bn) is not nn.BatchNorm2d or conv is None or not _products(conv):
        return False
    if conv._forward_hooks or conv._forward_pre_hooks or "forward" in conv.__dict__:
        return False
    if bn._forward_hooks or bn._forward_pre_hooks or "forward" in bn.__dict__ or not _weight(bn):
        return False
    unit.conv, unit.bn = fuse_conv_bn_eval(conv, bn), nn.Identity()
    return True


# ---- attributes ----


def padding_mode(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Conv2d) or module.dilation != (1, 1):
        return False
    module.padding_mode = rng.choice(["circular", "replicate"])
    return True


def dilation(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    module.dilation = (2, 2)
    module.padding = tuple(2 * (k // 2) for k in module.kernel_size)
    return True


def eps(model: nn.Module, name: str, rng: random.Random) -> bool:
    module = model.get_submodule(name)
    if not hasattr(module, "eps"):
        return False
    module.eps = rng.uniform(0.01, 0.5)
    return True


# ---- whole models: nothing to compare them with but themselves ----


def copied(model: nn.Module, name: str, rng: random.Random) -> bool:
    """Returns by way of the model's dict, for callers hold the model."""
    try:
        other = copy.deepcopy(model)
    except RuntimeError:  # tensors that are no leaves, as after pruning
        return False
    model.__dict__.update(other.__dict__)
    return True


def pickled(model: nn.Module, name: str, rng: random.Random) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(model, buffer)
    except Exception:  # hooks and classes that are local to a function
        return False
    buffer.seek(0)
    model.__dict__.update(torch.load(buffer, weights_only=False).__dict__)
    return True


TREATMENTS: dict[str, Treatment] = {
    function.__name__: function
    for function in (
        forward_hook,
        forward_pre_hook,
        backward_hook,
        patched_forward,
        pruned,
        pruned_for_good,
        parametrized,
        weight_norm,
        frozen,
        without_bias,
        with_bias,
        weight_as_tensor,
        adapted,
        subclassed,
        fused_batch_norm,
        padding_mode,
        dilation,
        eps,
        copied,
        pickled,
    )
}
