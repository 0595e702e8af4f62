"""What people do to models, by the rows of docs/compatibility.md: what happens, each with a test.

Sequences of such treatments, against plain compositions: tests/nn/test_composition.py.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from compositions import MODELS, Levels, block, plain_cednet, results
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from fastfuse import backend, explain, heads, models
from fastfuse.nn import CEDBlock, Conv2d, DepthwiseConv2d, LRCEDBlock, MultiLevelFusion
from fastfuse.tolerances import relative_error

TINY: dict[str, Any] = {"depths": (1, 2, 2, 1), "stages": 2}
every_model = pytest.mark.parametrize("name", MODELS)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2d(3, 4, 3, 2, 1)
        self.down = Conv2d(4, 6, 3, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.stem(images)
        return [stem, self.down(stem)]


# Whole models of images, small ones first.
FAST: dict[str, Callable[[], nn.Module]] = {
    "Segmentor": lambda: models.Segmentor(Backbone(), heads.UPerHead([4, 6], 5, 3)),
    "CEDNet": lambda: models.CEDNet(
        "tiny", "hourglass", channels=(4, 6, 8, 10), depths=(1, 2, 2, 1), stages=1
    ),
}
WHOLE: dict[str, Callable[[], nn.Module]] = {
    **FAST,
    "ResNetV1c": lambda: models.ResNetV1c(50),
    "DetectionFeatures": lambda: models.DetectionFeatures(
        models.CEDNet("tiny", channels=(4, 6, 8, 10), **TINY), 16, levels="p2-p6"
    ),
    "CEDNetClassifier": lambda: models.CEDNetClassifier("tiny", 5, **TINY),
    "RetinaNet": lambda: models.cednet_retinanet_tiny(3, **TINY),
    "UPerNet": lambda: models.cednet_upernet_tiny(5, **TINY),
}
whole = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in WHOLE]


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A whole model or one of a part, in evaluation mode, and inputs."""
    if name in WHOLE:
        return WHOLE[name]().eval(), [torch.randn(1, 3, 64, 96)]
    model, _, inputs = MODELS[name]()
    return model, inputs


def tensors(output: Any) -> tuple[Tensor, ...]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs.double()) <= tolerance


class Whole(nn.Module):
    """A model whose outputs are a tuple of tensors, as torch.jit wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tensors(self.model(*inputs))


# ---- hooks, weights, adapters --------------------------------------------------------------------


@every_model
def test_hooks_run_once_a_call(name: str) -> None:
    """Of every child, forward and backward."""
    model, _, inputs = MODELS[name]()
    counted = {n: 0 for n, m in model.named_modules() if n and type(m) is not nn.ModuleList}
    forward, backward = dict(counted), dict(counted)
    model = model.train()
    for child in counted:
        module = model.get_submodule(child)
        module.register_forward_hook(
            lambda *_, child=child: forward.update({child: forward[child] + 1})
        )
        if not isinstance(module, (nn.ReLU, nn.BatchNorm2d, fastfuse.nn.ScaleEqualizer)):
            module.register_full_backward_pre_hook(
                lambda *_, child=child: backward.update({child: backward[child] + 1})
            )
    model(*(x.requires_grad_() for x in inputs)).sum().backward()
    assert set(forward.values()) == {1}, forward
    assert set(backward.values()) <= {0, 1}
    assert sum(backward.values()) >= 2


def test_hooks_of_all_modules_see_children() -> None:
    model, _, inputs = block(False)
    seen: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(names[m]))
    try:
        assert explain(model) == {"": "hooks on all modules"}
        model(*inputs)
    finally:
        handle.remove()
    assert seen == ["dw", "norm", "fc1", "fc2", ""]
    assert explain(model) == {"": None}


def test_counting_flops_changes_nothing_of_what_is_counted() -> None:
    """FlopCounterMode names modules by hooks on all of them."""
    levels = [torch.randn(1, 64, 32 >> i, 32 >> i) for i in range(3)]
    model = MultiLevelFusion([64] * 3, 64)
    with FlopCounterMode(display=False) as counter:
        model(levels)
    counted = [str(op) for ops in counter.get_flop_counts().values() for op in ops]
    assert "fastfuse.fusion_conv2d" in counted


def test_pruning_trains_and_is_removed() -> None:
    model, plain, inputs = block(True)
    for each in (model, plain):
        prune.l1_unstructured(each.fc1, "weight", 0.3)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(*inputs).square().sum().backward()
            optimizer.step()
    assert_close(model(*inputs), plain(*inputs), 1e-9)
    prune.remove(model.fc1, "weight")
    assert explain(model) == {"": None}
    assert_close(model(*inputs), plain(*inputs), 1e-9)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.lr = CEDBlock(16, layer_scale=1.0), LRCEDBlock(16, layer_scale=1.0)
            self.head = heads.PSPHead(16, 16, 5, dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head([self.lr(self.block(x))])

    model, x = Model().eval(), torch.randn(2, 16, 12, 12)
    before = model(x).detach()
    config = peft.LoraConfig(r=4, target_modules=["fc1", "fc2", "bottleneck.conv", "conv_seg"])
    adapted = peft.get_peft_model(model, config)
    assert_close(adapted(x), before)
    for key, parameter in adapted.named_parameters():
        if "lora" in key:
            nn.init.normal_(parameter, std=0.2)
    output = adapted(x)
    assert relative_error(output, before.double()) > 0.1
    output.square().sum().backward()
    trained = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(grad is not None and grad.any() for grad in trained)
    assert "fc1 is a peft" in str(explain(adapted)["base_model.model.block"])
    merged = adapted.merge_and_unload()
    assert_close(merged(x), output)
    assert set(explain(merged).values()) == {None}


def test_offloading_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, _, inputs = MODELS["UPerHead"]()
    expected = model(*inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert_close(model(*inputs), expected, 1e-9)


def test_dynamic_quantization() -> None:
    model, x = CEDBlock(16, layer_scale=1.0).eval(), torch.randn(1, 16, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"needs a PyTorch that quantizes: {error}")
        output = quantized(x)
    assert "fc1 is a torch.ao" in str(explain(quantized)[""])
    assert 0 < relative_error(output, model(x).double()) < 0.1


def test_functional_calls() -> None:
    """Parameters of the call in place of the module's."""
    for name in ("CEDBlock", "MultiLevelFusion, equalized"):
        model, plain, inputs = MODELS[name]()
        parameters = {n: p * 0.5 for n, p in model.named_parameters()}
        mine, theirs = (
            torch.func.functional_call(m, parameters, tuple(inputs)) for m in (model, plain)
        )
        assert_close(mine, theirs, 1e-9)


# ---- children and attributes ---------------------------------------------------------------------


def test_fused_batch_norm_of_every_head() -> None:
    for name, make in MODELS.items():
        model, _, inputs = make()
        expected = model(*inputs)
        fused = 0
        for module in model.modules():
            if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
                fused += 1
        assert fused or "Block" in name
        assert_close(model(*inputs), expected, 1e-9)
        assert set(explain(model).values()) == {None}  # a bias takes nothing away


def test_an_equalizer_that_was_replaced_or_hooked() -> None:
    class Clamped(fastfuse.nn.ScaleEqualizer):
        def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
            return [x.clamp(-1, 1) for x in super().forward(features)]

    for name in ("MultiLevelFusion, equalized", "SeparableFusion"):
        model, _, inputs = MODELS[name]()
        expected = model(*inputs)
        ours = model.module
        calls: list[int] = []
        handle = ours.equalizer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert_close(model(*inputs), expected, 1e-9)
        assert calls == [1]
        handle.remove()
        ours.equalizer.__class__ = Clamped
        conv = getattr(ours, "conv", None)
        sizes = [F.interpolate(x, (12, 8), mode="bilinear") for x in inputs]
        levels = torch.cat(
            [
                ((x - ours.equalizer.mean[i]) / ours.equalizer.std[i]).clamp(-1, 1)
                for i, x in enumerate(sizes)
            ],
            1,
        )
        if conv is not None:
            expected = ours.activation(ours.bn(conv(levels)))
        else:
            expected = ours.pointwise_conv(ours.depthwise_conv(levels))
        assert_close(model(*inputs), expected, 1e-9)


def test_trainable_statistics() -> None:
    for name in ("MultiLevelFusion, equalized", "SeparableFusion"):
        model, _, inputs = MODELS[name]()
        expected, equalizer = model(*inputs), model.module.equalizer
        for statistic in ("mean", "std"):
            values = equalizer._buffers.pop(statistic)
            equalizer.register_parameter(statistic, nn.Parameter(values))
        assert explain(model)["module"] == (
            "equalizer is not as expected: statistics that need no gradient"
        )
        output = model(*inputs)
        assert_close(output, expected, 1e-9)
        output.pow(2).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in equalizer.parameters())


def test_a_forward_patched_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: 2 * method(*args)

    for kind, method, child in (
        (nn.Linear, "forward", "fc1"),
        (fastfuse.nn.LayerNorm2d, "forward", "norm"),
        (nn.Conv2d, "_conv_forward", "dw"),
    ):
        model, plain, inputs = block(True)
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, doubled(getattr(kind, method)))
            assert explain(model) == {"": f"{child} has a forward of its own"}
            output = model(*inputs)
        for module in plain.modules():
            if isinstance(module, (plain_cednet.Norm if kind is fastfuse.nn.LayerNorm2d else kind)):
                module.register_forward_hook(lambda module, x, y: 2 * y)
        assert_close(output, plain(*inputs), 1e-9)
        assert explain(model) == {"": None}


def test_compiled_code_sees_a_forward_that_is_set() -> None:
    model, x = CEDBlock(8, layer_scale=1.0).eval(), torch.randn(1, 8, 9, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before, forward = compiled(x), model.fc1.forward
    model.fc1.forward = lambda x: 2 * forward(x)
    assert_close(compiled(x), model(x))
    assert relative_error(compiled(x), before.double()) > 1e-3


def test_norms_without_eps() -> None:
    """An eps of 0, which the op refuses."""
    model, plain, inputs = block(False)
    model.norm.eps = plain.norm.eps = 0.0
    assert explain(model) == {"": "norm is not as expected: eps above 0"}
    assert_close(model(*inputs), plain(*inputs), 1e-9)


class Marked(nn.Parameter):
    """A tensor of a class of its own."""


def test_a_layer_scale_of_another_class() -> None:
    model, _, inputs = block(False)
    expected = model(*inputs)
    model.layer_scale = Marked(model.layer_scale.detach())
    assert explain(model) == {"": "layer_scale is a Marked"}
    assert_close(model(*inputs), expected, 1e-9)


@pytest.mark.parametrize("attribute", ["padding_mode", "stride", "dilation", "padding"])
def test_attributes_of_convolutions(attribute: str) -> None:
    value: Any = {"padding_mode": "reflect", "stride": 2, "dilation": 2, "padding": (0, 1)}[
        attribute
    ]
    x = torch.randn(2, 8, 9, 10)
    for conv in (
        Conv2d(8, 8, 3, padding=1),
        Conv2d(8, 8, 3, padding=1, groups=8),
        DepthwiseConv2d(8, 3),
        MultiLevelFusion([8], 8).conv,
    ):
        setattr(conv, attribute, value)
        assert_close(conv(x), nn.Conv2d.forward(conv, x))
    unit = MultiLevelFusion([8], 8)
    setattr(unit.conv, attribute, value)
    assert_close(unit([x]), unit.activation(unit.bn(nn.Conv2d.forward(unit.conv, x))))


def test_norms_in_float32() -> None:
    """Of a bfloat16 block, whose MLP stays in bfloat16."""
    for kind in (CEDBlock, LRCEDBlock):
        model, x = kind(8, layer_scale=1.0), torch.randn(2, 8, 9, 9)
        expected = model(x)
        model.bfloat16().norm.float()
        assert explain(model) == {"": "parameters of several dtypes"}
        output = model(x.bfloat16())
        assert output.dtype == torch.bfloat16
        assert relative_error(output, expected.double()) < 0.03


def test_a_layer_scale_in_float32() -> None:
    model, x = CEDBlock(8, layer_scale=1.0), torch.randn(2, 8, 9, 9)
    expected = model(x)
    scale = model.layer_scale.detach()
    model.bfloat16().layer_scale = nn.Parameter(scale)
    assert explain(model) == {"": "parameters of several dtypes"}
    assert relative_error(model(x.bfloat16()), expected.double()) < 0.03


def test_arguments_by_name() -> None:
    block, fusion, head = CEDBlock(8), MultiLevelFusion([8], 8), heads.FCNHead(8, 8, 3)
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(block(x=x), block(x))
    assert torch.equal(fusion(features=[x], size=(5, 5)), fusion([x], (5, 5)))
    assert torch.equal(head.eval()(features=[x]), head([x]))


@every_model
def test_copies_and_pickles(name: str) -> None:
    model, _, inputs = MODELS[name]()
    expected = results(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for key, value in results(other, inputs).items():
            assert torch.equal(value, expected[key]), key


@every_model
def test_meta_tensors(name: str) -> None:
    model, _, inputs = MODELS[name]()
    shape = model(*inputs).shape
    output = model.to("meta")(*(x.to("meta") for x in inputs))
    assert output.is_meta
    assert output.shape == shape


# ---- ambient settings, threads -------------------------------------------------------------------


@every_model
def test_the_ambient_device_and_dtype_change_nothing(name: str) -> None:
    model, _, inputs = MODELS[name]()
    expected = results(model, inputs)

    def check(found: dict[str, Tensor]) -> None:
        for key, value in found.items():
            assert torch.equal(value, expected[key]), key

    with torch.device("meta"):
        check(results(model, inputs))
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(results(model, inputs))
    finally:
        torch.set_default_dtype(torch.float32)


def test_constants_in_an_ambient_device() -> None:
    levels = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    constants: dict[str, Any] = {"mean": [0.1, 0.2], "std": [1.0, 2.0]}
    weight = torch.randn(8, 8, 3, 3)
    expected = fastfuse.fusion_conv2d(levels, weight, **constants)
    equalizer = fastfuse.nn.ScaleEqualizer(2)
    with torch.device("meta"):
        assert torch.equal(fastfuse.fusion_conv2d(levels, weight, **constants), expected)
        equalizer.set_statistics(**constants)
    assert equalizer.mean.tolist() == pytest.approx([0.1, 0.2])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fastfuse.nn.ScaleEqualizer(2).mean.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_share_a_model() -> None:
    """With children that are called and with the op, forward and backward."""
    model, _, inputs = MODELS["UPerHead"]()
    model.module.fpn_convs[0].conv.register_forward_hook(lambda module, x, y: y)
    expected = model(*inputs).detach()
    wrong: list[float] = []

    def run() -> None:
        for _ in range(20):
            output = model(*(x.clone().requires_grad_() for x in inputs))
            output.sum().backward()
            if not torch.allclose(output, expected, rtol=0, atol=1e-12):
                wrong.append(float((output - expected).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", whole)
def test_one_graph_for_all_sizes(name: str) -> None:
    model, graphs = WHOLE[name]().eval(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for size, batch in (((256, 384), 2), ((384, 640), 3)):
            images = torch.randn(batch, 3, *size)
            assert_close(compiled(images), model(images))
    assert len(graphs) == 1


@contextlib.contextmanager
def branches_of_the_package() -> Iterator[None]:
    """A warning of torch.jit.trace is an error, but for those that the package takes back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastfuse\.")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("name", [*MODELS, *whole])
def test_traces_run_at_other_sizes(name: str) -> None:
    """torch.jit.trace records PyTorch's functions where an op names a size."""
    model, inputs = made(name)
    if isinstance(model, Levels):
        model.size = None
    with torch.no_grad(), branches_of_the_package():
        traced = torch.jit.trace(Whole(model), tuple(inputs), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        traced = torch.jit.load(buffer)
        larger = [F.interpolate(x, scale_factor=2.0) for x in inputs]
        for images in (inputs, larger):
            assert_close(traced(*images), Whole(model)(*images))


def test_a_winograd_convolution_traces() -> None:
    conv, x = Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 32, 32)
    with torch.no_grad(), branches_of_the_package():
        traced = torch.jit.trace(conv, (x,), check_trace=False)
        larger = torch.randn(2, 128, 41, 50)
        assert_close(traced(larger), conv(larger))
    with (
        backend("cpu"),
        branches_of_the_package(),
        pytest.raises(fastfuse.BackendError, match=r"torch\.export keeps sizes open"),
    ):
        torch.jit.trace(lambda *x: fastfuse.upsample_equalize_concat(x), (x, x))


@pytest.mark.parametrize("name", [*MODELS, *whole])
def test_the_reference_exports_pytorchs_functions_alone(name: str) -> None:
    model, inputs = made(name)
    with torch.no_grad(), backend("reference"):
        program = torch.export.export(model, tuple(inputs))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not [target for target in called if "fastfuse" in target]


@pytest.mark.parametrize("name", ["ResNetV1c", "CEDNet"])
def test_torch_fx(name: str) -> None:
    """Backbones, whose blocks, norms and heads are leaves; bad images are still refused by name."""
    model, images = WHOLE[name]().eval(), torch.randn(1, 3, 64, 96)
    graph = torch.fx.symbolic_trace(model)
    for mine, theirs in zip(graph(images), model(images), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=f"{name}: images must have 3 channels"):
        graph(images[:, :2])
    if name == "CEDNet":
        assert type(graph.get_submodule("stages.0.encoder.0.0")) is CEDBlock


def test_torch_fx_of_heads() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(Conv2d(3, c, 3, padding=1) for c in (4, 6))
            self.head = heads.UPerHead([4, 6], 4, 3)
            self.fusion = MultiLevelFusion([3, 3], 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head([body(x) for body in self.body]) + self.fusion([x, x]).mean()

    model, x = Model().eval(), torch.randn(1, 3, 16, 16)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x), model(x))
    assert {"head", "fusion"} <= {node.target for node in graph.graph.nodes}


def test_feature_extractors() -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images = WHOLE["ResNetV1c"]().eval(), torch.randn(1, 3, 64, 96)
    found = create_feature_extractor(model, {"layer2": "a", "layer4": "b"})(images)
    _, a, _, b = model(images)
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)


def test_what_is_not_finite_stays_so() -> None:
    """An infinite hidden value: NaN by the op, an infinity by PyTorch."""
    model, x = CEDBlock(8, layer_scale=1.0), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        model.fc1.bias[3] = math.inf
    assert not model(x).isfinite().any()
    with backend("reference"):
        assert model(x).isinf().all()


def whole_models() -> dict[str, nn.Module]:
    return {
        "UPerNet": models.cednet_upernet_tiny(5, channels=(4, 6, 8, 10), **TINY),
        "CEDNetClassifier": models.CEDNetClassifier("tiny", 5, channels=(4, 6, 8, 10), **TINY),
    }


def test_a_backbone_is_called() -> None:
    """In training and in evaluation, wherever hooks and wrappers are."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    images = torch.randn(2, 3, 64, 64)
    targets = {
        "UPerNet": torch.randint(5, (2, 64, 64)),
        "CEDNetClassifier": torch.randint(5, (2,)),
    }
    for name, model in whole_models().items():
        for head in model.modules():
            if isinstance(head, nn.Dropout2d):
                head.p = 0.0
        calls: list[str] = []
        expected = model(images, targets[name])
        model.backbone.register_forward_hook(lambda *_, calls=calls: calls.append("hook"))
        assert_close(model(images, targets[name]), expected, 1e-5)
        model.eval()(images)
        assert calls == ["hook"] * 2
        wrappers = [checkpoint_wrapper]
        if name == "UPerNet":  # to trace one backbone takes long enough
            wrappers.append(lambda b: torch.compile(b, backend="eager"))
        for wrap in wrappers:
            wrapped = whole_models()[name]
            wrapped.backbone = wrap(wrapped.backbone)
            wrapped(images, targets[name]).backward()
            assert all(p.grad is not None for p in wrapped.backbone.parameters())
            if wrap is checkpoint_wrapper:
                wrapped.eval()(images)
        if name != "UPerNet":
            continue
        model.train().backbone.compile(
            backend=lambda graph, _, calls=calls: (calls.append("compiled"), graph)[1]
        )
        assert_close(model(images, targets[name]), expected, 1e-5)
        assert "compiled" in calls


# ---- the document --------------------------------------------------------------------------------


def test_every_row_names_a_test() -> None:
    root = Path(__file__).parents[2]
    rows = [
        line
        for line in (root / "docs" / "compatibility.md").read_text("utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| What")
    ]
    assert len(rows) > 30
    sources = [path.read_text("utf-8") for path in (root / "tests").rglob("test_*.py")]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for test in named:
            assert any(f"def {test}(" in source for source in sources), f"{test}: {row}"


def test_a_convolution_of_the_instance_s_own() -> None:
    """``_conv_forward`` set on it, as for textures that tile."""

    def circular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (3,) * 4, mode="circular"), weight, bias, groups=8)

    block, x = CEDBlock(8, layer_scale=1.0), torch.randn(2, 8, 9, 9)
    block.dw._conv_forward = circular
    assert_close(block.dw(x), circular(x, block.dw.weight, block.dw.bias))
    assert explain(block) == {"": "dw has a forward of its own"}
