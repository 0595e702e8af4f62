"""Segmentor.predict, which changes nothing of a model that others train meanwhile."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfuse import heads, models
from fastfuse.models import Segmentor
from fastfuse.models.evaluation import in_evaluation


class Backbone(nn.Module):
    """One feature of stride 2; ``pause`` is called in the middle of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.pause: Callable[[bool], None] | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.conv(images)
        if self.pause is not None:
            self.pause(self.training)
        return [self.norm(x)]


def segmentor(backbone: nn.Module | None = None) -> Segmentor:
    decode, auxiliary = (
        heads.FCNHead(4, 4, 3, num_convs=1, concat_input=False, dropout=0.5) for _ in range(2)
    )
    backbone = Backbone() if backbone is None else backbone
    return Segmentor(backbone, decode, auxiliary, auxiliary_index=0)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8))


def step(model: Segmentor) -> None:
    """A training step large enough to move predictions."""
    images, targets = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images, targets).backward()
    optimizer.step()


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def labels_of(model: Segmentor, images: Tensor) -> Tensor:
    """What the model itself gives in evaluation mode; then trains on."""
    before = flags(model)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    for name, module in model.named_modules():
        module.training = before[name]
    return labels


def run(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread, started, and what it returned or raised."""
    results: list[Any] = []

    def body() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, results


@pytest.mark.parametrize("held", ["predict", "train"])
def test_predict_and_a_training_step_in_two_threads(held: str) -> None:
    """One is held in the middle of its forward while all of the other runs."""
    model, (images, _) = segmentor(), batch()
    entered, proceed = threading.Event(), threading.Event()

    def pause(training: bool) -> None:
        if training == (held == "train") and not entered.is_set():
            entered.set()
            assert proceed.wait(30)

    model.backbone.pause = pause
    actions = {"predict": lambda: model.predict(images), "train": lambda: step(model)}
    thread, results = run(actions[held])
    assert entered.wait(30)
    assert all(flags(model).values())
    other = actions["train" if held == "predict" else "predict"]()
    assert all(flags(model).values())
    tracked = model.backbone.norm.num_batches_tracked.item()
    proceed.set()
    thread.join()
    assert all(flags(model).values())
    model.backbone.pause = None
    if held == "train":  # the held step saw its flags: batch statistics, and dropout
        assert results == [None]
        assert (tracked, model.backbone.norm.num_batches_tracked.item()) == (0, 1)
    else:  # all after the pause was read after the step
        assert tracked == model.backbone.norm.num_batches_tracked.item() == 1
        assert isinstance(results[0], Tensor)
    assert (results[0] if held == "predict" else other).shape == images[:, 0].shape
    assert torch.equal(model.predict(images), labels_of(model, images))


def test_threads_predict_while_another_trains() -> None:
    """The training steps' rate and momentum are 0, so that what is right stays the same."""
    model, (images, targets) = segmentor(), batch()
    step(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    expected, steps = labels_of(model, images), 60
    start = [norm.num_batches_tracked.item() for norm in norms]
    done = threading.Event()

    def train() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        try:
            for _ in range(steps):
                model(images, targets).backward()
                optimizer.step()
                assert all(flags(model).values())
        finally:
            done.set()

    def predict() -> bool:
        while True:
            last = done.is_set()
            if not torch.equal(model.predict(images), expected):
                return False
            if last:
                return True

    threads = [run(train), run(predict), run(predict)]
    for thread, _ in threads:
        thread.join()
    assert [results for _, results in threads] == [[None], [True], [True]]
    assert [norm.num_batches_tracked.item() for norm in norms] == [n + steps for n in start]


def test_predict_keeps_buffers_and_gradients() -> None:
    model, (images, targets) = segmentor(), batch()
    model(images, targets).backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [p.grad.clone() for p in model.parameters()]
    model.predict(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for p, grad in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_model_in_evaluation_mode_is_no_copy() -> None:
    model = segmentor().eval()
    assert in_evaluation("predict", model) is model
    model.decode_head.dropout.train()
    assert in_evaluation("predict", model) is not model


def test_the_copy_has_the_model_s_tensors_and_hooks() -> None:
    model = segmentor()
    seen: list[bool] = []
    model.backbone.register_forward_hook(lambda module, args, output: seen.append(module.training))
    copy = in_evaluation("predict", model)
    assert not any(flags(copy).values())
    assert flags(copy).keys() == flags(model).keys()
    for ours, theirs in zip(copy.modules(), model.modules(), strict=True):
        assert ours is not theirs
        assert type(ours) is type(theirs)
        assert ours._parameters is theirs._parameters
        assert ours._buffers is theirs._buffers
        assert ours._forward_hooks is theirs._forward_hooks
    model.backbone.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    assert copy.backbone.conv.weight is model.backbone.conv.weight
    model.predict(batch()[0])
    assert seen == [False]


# ---- what modules are changed into ---------------------------------------------------------------


class Shared(Backbone):
    """One norm by three ways: as a child, in a list, as another child's."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Sequential(self.norm)
        self.parts = {"norms": [self.norm]}
        self.parent = weakref.ref(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        parent = self.parent()
        assert parent is self
        return [self.parts["norms"][0](self.again(self.norm(self.conv(images))))]


class Collecting(Backbone):
    """What a hook of its child puts on it, it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.register_forward_hook(self.collect)

    def collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.feature = output

    def forward(self, images: Tensor) -> list[Tensor]:
        super().forward(images)
        return [self.feature]


class Closing(Collecting):
    """The same by a closure."""

    def __init__(self) -> None:
        Backbone.__init__(self)
        self.norm.register_forward_hook(lambda *args: self.collect(*args))


def replaced(forward: Callable[[nn.Module], Callable[..., Any]]) -> nn.Module:
    """A backbone and its norm with a forward on the instance."""
    backbone = Backbone()
    for module in (backbone, backbone.norm):
        module.forward = forward(module)
    return backbone


def hooked(module: nn.Module) -> Callable[..., Any]:
    """As accelerate's add_hook_to_module replaces it."""
    module._old_forward = module.forward

    def new_forward(module: Any, *args: Any) -> Any:
        return module._old_forward(*args)

    new = functools.partial(new_forward, module)
    return functools.update_wrapper(new, module._old_forward)


def closing(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    @functools.wraps(forward)
    def new_forward(*args: Any, **options: Any) -> Any:
        return forward(*args, **options)

    return new_forward


def converted(module: nn.Module) -> Callable[..., Any]:
    """As accelerate does for mixed precision: a method again, of a decorated function."""
    function = torch.no_grad()(type(module).forward)
    return function.__get__(module)


def normalized() -> nn.Module:
    backbone = Backbone()
    nn.utils.parametrizations.weight_norm(backbone.conv)
    nn.utils.parametrizations.spectral_norm(backbone.conv)
    return backbone


class Watcher:
    """Knows the model, as tools for activation maps do; a hook of it does not reach the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def save(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.note(output)

    def note(self, output: Tensor) -> None:
        self.seen.append(output.shape)

    def again(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.norms()(output)

    def norms(self) -> nn.Module:
        return self.model.norm


class Calling(Watcher):
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.model.norm(output)


class Slotted:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    __call__ = Calling.__call__


def with_hook(hook: Callable[[Any], Callable[..., Any]]) -> nn.Module:
    backbone = Backbone()
    backbone.conv.register_forward_hook(hook(backbone))
    return backbone


def by_default(backbone: Any) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor, norm: Any = backbone.norm) -> None:
        norm(output)

    return hook


def by_named_default(backbone: Any) -> Callable[..., Any]:
    def hook(*args: Any, norms: Any = (backbone.norm,)) -> None:
        norms[0](args[2])

    return hook


def by_closure(backbone: Any) -> Callable[..., Any]:
    watcher = Watcher(backbone)
    return lambda *args: watcher.save(*args)


KNOWN: dict[str, Any] = {}


def reaching_further(output: Tensor) -> None:
    KNOWN["norm"](output)


def by_global(backbone: Any) -> Callable[..., Any]:
    KNOWN["norm"] = backbone.norm

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        reaching_further(output)

    return hook


class Indexed(Backbone):
    """Its norm in what modules seldom have."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.index = deque([self.norm], 3), {self.norm: 2.0}

    def forward(self, images: Tensor) -> list[Tensor]:
        norm = self.queue[0]
        return [norm(self.conv(images)) * self.index[norm]]


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "collecting": Collecting,
    "collecting in a closure": Closing,
    "forward of a partial": lambda: replaced(hooked),
    "forward of a closure": lambda: replaced(closing),
    "forward of a method": lambda: replaced(converted),
    "hook with a default": lambda: with_hook(by_default),
    "hook with a named default": lambda: with_hook(by_named_default),
    "hook of an object that knows the model": lambda: with_hook(lambda b: Watcher(b).save),
    "hook of a closure of it": lambda: with_hook(by_closure),
    "deque and keys": Indexed,
    "parametrized": normalized,
    "old spectral norm": lambda: (b := Backbone(), nn.utils.spectral_norm(b.conv))[0],
    "data parallel": lambda: nn.DataParallel(Backbone()),
    "traced": lambda: torch.fx.symbolic_trace(Backbone()),
    "scripted for evaluation": lambda: torch.jit.trace(nn.Conv2d(3, 4, 1).eval(), batch()[0]),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_predict_of_a_backbone_in_training_mode(name: str) -> None:
    """Equal to evaluation mode's, and the buffers of training do not move."""
    model, (images, _) = segmentor(BACKBONES[name]()), batch()
    if "scripted" not in name:
        step(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = flags(model)
    labels = model.predict(images[:1])
    assert flags(model) == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(labels, labels_of(model, images[:1]))


def test_predict_of_a_compiled_backbone() -> None:
    """It stays compiled, and is compiled for evaluation once."""
    count = 0

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    model, (images, _) = segmentor(torch.compile(Backbone(), backend=counting)), batch()
    step(model)
    assert count == 1
    first = model.predict(images)
    assert count == 2
    assert torch.equal(model.predict(images), first)
    assert torch.equal(labels_of(model, images), first)
    assert count == 2
    model = segmentor()
    model.backbone.compile(backend=counting)
    step(model)
    assert torch.equal(model.predict(images), labels_of(model, images))


class Runner:
    def __init__(self, module: nn.Module) -> None:
        self.modules = [module]

    def __call__(self, x: Tensor) -> Tensor:
        return self.modules[0](x)


class SlottedRunner:
    __slots__ = ("modules",)
    __init__, __call__ = Runner.__init__, Runner.__call__


class Running(Backbone):
    def __init__(self, runner: Callable[[nn.Module], Any] = Runner) -> None:
        super().__init__()
        self.runner = runner(self.norm)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.runner(self.conv(images))]


def exported() -> nn.Module:
    return torch.export.export(Backbone().eval(), (batch()[0],)).module()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "object": (Running, r"backbone\.runner is an object \(Runner\) that refers to modules"),
    "object with slots": (
        lambda: Running(SlottedRunner),
        r"backbone\.runner is an object \(SlottedRunner\) that refers to modules",
    ),
    "hook of an object": (
        lambda: with_hook(lambda b: Watcher(b).again),
        r"backbone\.conv\._forward_hooks has Watcher\.norms, which reaches modules of it by model",
    ),
    "hook that is an object": (
        lambda: with_hook(Calling),
        r"backbone\.conv\._forward_hooks has Calling\.__call__, which reaches .* by model",
    ),
    "hook that is an object with slots": (lambda: with_hook(Slotted), "which reaches .* by model"),
    "hook that names a global": (
        lambda: with_hook(by_global),
        r"has reaching_further, which reaches modules of it by KNOWN",
    ),
    "lazy": (lambda: nn.LazyConv2d(4, 1), "backbone is lazy and has not run yet"),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(3, 4, 1)), "backbone is TorchScript in"),
    "exported": (exported, r"backbone has a train\(\) of its own, as exported programs have"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_predict_refuses_in_training_mode(name: str) -> None:
    make, message = REFUSED[name]
    model = segmentor(make())
    images, _ = batch()
    with pytest.raises(RuntimeError, match=f"^Segmentor: .*{message}.*; call the model's eval"):
        model.predict(images)
    if name != "exported":  # whose eval() raises
        assert model.eval().predict(images).shape == (2, 8, 8)


def test_predict_of_a_whole_model_in_training_mode() -> None:
    model = models.cednet_upernet_tiny(3, depths=(1, 1, 1, 1), drop_path=0.5)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.predict(images), labels_of(model, images))
