"""Models of transformers, converted, against themselves: random weights, small."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastfuse
from fastfuse.tolerances import relative_error

transformers = pytest.importorskip("transformers")

SIZES = [8, 16, 24, 32]
CLASSES = 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def segformer(**options: Any) -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=SIZES, num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, num_labels=CLASSES, drop_path_rate=0.3, **options,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def upernet(backbone: Any = None, **options: Any) -> nn.Module:
    if backbone is None:
        backbone = transformers.ConvNextConfig(
            depths=[1, 1, 2, 1], hidden_sizes=SIZES, out_features=STAGES, drop_path_rate=0.3,
            layer_scale_init_value=0.7,
        )  # fmt: skip
    options = {"auxiliary_concat_input": True, "auxiliary_channels": 8, **options}
    config = transformers.UperNetConfig(
        backbone_config=backbone, auxiliary_in_channels=24, hidden_size=16, num_labels=CLASSES,
        **options,
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=STAGES,
    )  # fmt: skip
    return upernet(config, use_auxiliary_head=False)


MODELS: dict[str, Callable[[], nn.Module]] = {"segformer": segformer, "upernet": upernet}
every_model = pytest.mark.parametrize("name", MODELS)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The original, and the same converted."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # so that each does something
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    converted = copy.deepcopy(model)
    assert "decode_head" in fastfuse.convert(converted).converted
    return model, converted


def batch(height: int = 70, width: int = 90, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    labels = torch.randint(CLASSES, (2, height, width))
    labels[0, :9] = 255
    return {"pixel_values": torch.randn(2, 3, height, width, dtype=dtype), "labels": labels}


def results(model: nn.Module, inputs: dict[str, Any], call: Any = None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    output = (model if call is None else call)(**inputs)
    output.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for key, value in theirs.items():
        error = (ours[key] - value).abs().max()
        # What is zero but for rounding, such as gradients of biases before batch norm, is noise.
        assert error <= tolerance * max(float(value.abs().max()), 1e-3 * largest), key
        assert ours[key].is_contiguous() == value.is_contiguous(), key


@every_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_and_gradients(name: str, training: bool, layout: torch.memory_format) -> None:
    """With stochastic depth and dropout: of the same random numbers."""
    models = [m.train(training).to(memory_format=layout) for m in pair(MODELS[name])]
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=layout)
    theirs, ours = (results(model, inputs) for model in models)
    assert_same(ours, theirs, 1e-4)
    if training:
        for (key, a), b in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=key)


@every_model
def test_values_and_gradients_in_float64(name: str) -> None:
    inputs = batch(64, 64, torch.float64)
    theirs, ours = (results(m.double().train(), inputs) for m in pair(MODELS[name]))
    assert_same(ours, theirs, 1e-10)


def test_upernet_swin() -> None:
    theirs, ours = (m.eval() for m in pair(swin))
    inputs = batch(64, 64)
    assert_same(results(ours, inputs), results(theirs, inputs), 1e-4)


@every_model
def test_outputs_as_asked(name: str) -> None:
    """Tuples, hidden states, and models without labels."""
    model, converted = (m.eval() for m in pair(MODELS[name]))
    inputs = batch(64, 64)
    for labels in (None, inputs["labels"]):
        for options in ({"output_hidden_states": True}, {"return_dict": False}, {}):
            asked = {"pixel_values": inputs["pixel_values"], "labels": labels, **options}
            with torch.no_grad():
                theirs, ours = model(**asked), converted(**asked)
            assert type(ours) is type(theirs)
            if not isinstance(theirs, tuple):
                assert list(ours.keys()) == list(theirs.keys())
                theirs, ours = theirs.to_tuple(), ours.to_tuple()
            for expected, value in zip(theirs, ours, strict=True):
                if isinstance(expected, tuple):
                    assert len(value) == len(expected)
                else:
                    assert relative_error(value, expected) < 1e-4


def test_losses_that_are_left() -> None:
    """Of one class, and of labels that are no class of each pixel."""
    inputs = batch(32, 32)
    model, converted = pair(lambda: segformer())
    for m in (model, converted):
        m.eval()
        m.config.num_labels = 1
        m.decode_head.classifier = nn.Conv2d(16, 1, 1)
    converted.load_state_dict(model.state_dict())
    inputs["labels"] = (inputs["labels"] == 1).long()
    assert_same(results(converted, inputs), results(model, inputs), 1e-4)
    for name in MODELS:
        model, converted = (m.eval() for m in pair(MODELS[name]))
        probabilities = torch.rand(2, CLASSES, 32, 32)
        for labels in (probabilities, torch.zeros(3, 32, 32, dtype=torch.int64)):
            inputs["labels"] = labels
            for m in (model, converted):
                with pytest.raises((RuntimeError, ValueError)):
                    m(**inputs)


def test_upsampled_logits_are_never_built() -> None:
    _, converted = pair(segformer)
    inputs = batch(64, 64)
    exported = torch.export.export(converted.eval(), (), inputs)
    shapes = [
        tuple(node.meta["val"].shape)
        for node in exported.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    ]
    assert (2, CLASSES, 16, 16) in shapes
    assert (2, CLASSES, 64, 64) not in shapes


TREATED = {
    "segformer": ["decode_head.linear_projections.1.proj", "decode_head.linear_fuse"],
    "upernet": [
        "decode_head.fpn_bottleneck.conv", "decode_head.lateral_convs.0.conv",
        "backbone.encoder.stages.0.layers.0.pwconv1", "backbone.encoder.stages.2.layers.1.dwconv",
        "auxiliary_head.conv_cat.conv",
    ],
}  # fmt: skip


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original0[::2].mul_(1.5)  # type: ignore[union-attr,operator]


def squaring_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output.square())


def own_forward(module: nn.Module) -> None:
    forward = type(module).forward
    module.forward = lambda x: forward(module, x).square()  # type: ignore[method-assign]


@every_model
@pytest.mark.parametrize("treatment", [weight_norm, squaring_hook, own_forward])
def test_treated_children(name: str, treatment: Callable[[nn.Module], None]) -> None:
    """Before and after conversion, of every child that an op reads."""
    inputs = batch(32, 32)
    for child in TREATED[name]:
        model, converted = (m.eval() for m in pair(MODELS[name]))
        before = results(model, inputs)
        for m in (model, converted):
            treatment(m.get_submodule(child))
        again = copy.deepcopy(model) if treatment is weight_norm else None
        theirs = results(model, inputs)
        changes = [relative_error(theirs[key], before[key]) for key in ("logits", "loss")]
        assert max(changes) > 1e-3, child
        assert_same(results(converted, inputs), theirs, 1e-4)
        if again is not None:
            fastfuse.convert(again)
            assert_same(results(again, inputs), theirs, 1e-4)


@every_model
def test_hooks_of_replaced_modules(name: str) -> None:
    model, converted = (m.eval() for m in pair(MODELS[name]))
    inputs = batch(32, 32)
    seen: list[list[tuple[int, ...]]] = [[], []]
    for m, found in zip((model, converted), seen, strict=True):
        m.decode_head.register_forward_pre_hook(
            lambda module, args: ([2 * level for level in args[0]],)
        )
        m.decode_head.register_forward_hook(lambda module, args, output: output + 1)
        for child in TREATED[name]:
            m.get_submodule(child).register_forward_hook(
                lambda module, args, output, found=found: found.append(tuple(args[0].shape))
            )
    assert_same(results(converted, inputs), results(model, inputs), 1e-4)
    assert sorted(seen[0]) == sorted(seen[1])


@every_model
def test_lora(name: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {
        "segformer": ["proj", "linear_fuse"],
        "upernet": ["pwconv1", "pwconv2", "fpn_bottleneck.conv"],
    }
    model, converted = (m.eval() for m in pair(MODELS[name]))
    before = model(**(inputs := batch(32, 32))).logits.detach()
    adapted = []
    for m in (model, converted):
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=targets[name], init_lora_weights=False, r=2)
        adapted.append(peft.get_peft_model(m, config).eval())
    theirs, ours = (results(m, inputs) for m in adapted)
    assert relative_error(theirs["logits"], before) > 1e-3
    assert_same(ours, theirs, 1e-4)
    fastfuse.convert(adapted[0])
    assert_same(results(adapted[0], inputs), theirs, 1e-4)
    merged = adapted[1].merge_and_unload()
    with torch.no_grad():
        assert relative_error(merged(**inputs).logits, theirs["logits"]) < 1e-4


@every_model
def test_autocast(name: str) -> None:
    model, converted = (m.eval() for m in pair(MODELS[name]))
    inputs = batch(32, 32)
    exact = results(copy.deepcopy(model).double(), inputs | {
        "pixel_values": inputs["pixel_values"].double()
    })  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = results(model, inputs), results(converted, inputs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
    for key in ("loss", "logits"):
        off = relative_error(theirs[key], exact[key])
        assert relative_error(ours[key], exact[key]) < max(1.5 * off, 1e-2), key


@every_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled(name: str, training: bool) -> None:
    _, converted = pair(MODELS[name])
    for module in converted.modules():  # random numbers of a graph are others
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    converted.train(training)
    inputs = batch(64, 64)
    expected = results(converted, inputs)  # transformers adds hooks that cannot be traced
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert_same(results(converted, inputs, compiled), expected, 1e-4)


@every_model
def test_exported(name: str) -> None:
    _, converted = pair(MODELS[name])
    images = batch(64, 64)["pixel_values"]
    with torch.no_grad():
        expected = converted.eval()(images).logits
        exported = torch.export.export(converted, (images,))
        assert "fastfuse.fusion_conv2d" in exported.graph_module.code
        assert relative_error(exported.module()(images).logits, expected) < 1e-5


@every_model
def test_copies_pickles_and_reversal(name: str) -> None:
    model, converted = (m.eval() for m in pair(MODELS[name]))
    inputs = batch(32, 32)
    expected = results(model, inputs)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same(results(copy.deepcopy(converted), inputs), expected, 1e-4)
    head = pickle.loads(pickle.dumps(converted.decode_head))  # transformers' backbones have hooks
    for module in head.modules():
        assert module.forward.__func__ is type(module).forward
    converted.decode_head = head
    assert_same(results(converted, inputs), expected, 1e-4)
    fastfuse.revert(converted)
    assert_same(results(converted, inputs), expected, 0)


def test_others_psp_forward() -> None:
    class Head(type(upernet().decode_head)):  # type: ignore[misc]
        def psp_forward(self, inputs: list[Tensor]) -> Tensor:
            return 2 * super().psp_forward(inputs)

    model = upernet()
    model.decode_head.__class__ = Head
    assert fastfuse.convert(model).left["decode_head"] == "has a psp_forward of its own"


def test_convnextv2_is_left_with_a_reason() -> None:
    config = transformers.ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=SIZES)
    model = transformers.ConvNextV2Model(config).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).last_hidden_state
    report = fastfuse.convert(model)
    assert "response" in report.left["encoder.stages.0.layers.0"]
    assert "encoder.stages.0.layers.0.dwconv" in report.converted
    torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def _gradients_of_rank(rank: int, name: str, convert: bool, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}.init", rank=rank, world_size=2)
    try:
        model, converted = pair(MODELS[name])
        wrapped = nn.parallel.DistributedDataParallel(
            (converted if convert else model).eval(), find_unused_parameters=False
        )
        torch.manual_seed(rank)
        wrapped(**batch(32, 32)).loss.backward()
        if rank == 0:
            torch.save({k: p.grad for k, p in wrapped.module.named_parameters()}, path)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
@every_model
def test_distributed_data_parallel(name: str) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for convert in (False, True):
            path = os.path.join(folder, f"{convert}.pt")
            torch.multiprocessing.spawn(_gradients_of_rank, (name, convert, path), nprocs=2)
            found.append(torch.load(path))
    assert_same(found[1], found[0], 1e-4)
