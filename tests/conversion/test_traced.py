"""Modules of no known class: chains found by torch.fx, and what is left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_results import assert_same_results, randomized
from torch import Tensor, nn

import fastfuse


class Decoder(nn.Module):
    """Somebody's: sizes from the finest level, a unit after the concatenation."""

    def __init__(self, corners: bool = False) -> None:
        super().__init__()
        self.corners = corners
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (4, 8, 16))
        self.fuse = nn.Sequential(
            nn.Conv2d(24, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.classify = nn.Conv2d(8, 5, 1)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        maps = [conv(x) for conv, x in zip(self.lateral, (fine, middle, coarse))]  # noqa: B905
        size = fine.shape[2:]
        for i in range(1, len(maps)):
            maps[i] = F.interpolate(maps[i], size=size, mode="bilinear", align_corners=self.corners)
        return self.classify(self.fuse(torch.cat(maps, dim=1)))


class Skip(nn.Module):
    """By a factor, and the upsampled map is read twice."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        up = F.interpolate(coarse, scale_factor=self.scale, mode="bilinear", align_corners=True)
        return self.conv(torch.cat((up, skip), 1)) + up


def decoder_inputs(size: tuple[int, int] = (13, 18)) -> tuple[Tensor, ...]:
    height, width = size
    return tuple(
        torch.randn(2, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate((4, 8, 16))
    )


@pytest.mark.parametrize("corners", [False, True])
def test_results(corners: bool) -> None:
    model = randomized(Decoder(corners))
    report = assert_same_results(model, *decoder_inputs(), converted="")
    assert f"{__name__}:Decoder" in str(report)
    assert_same_results(Skip(), torch.randn(2, 8, 5, 7), torch.randn(2, 4, 10, 14), converted="")


def test_sizes_copies_pickles_and_hooks() -> None:
    model = randomized(Decoder()).eval()
    reference = copy.deepcopy(model)
    keys = list(model.state_dict())
    assert fastfuse.convert(model).converted[0] == ""
    assert fastfuse.convert(model).converted[0] == ""
    assert list(model.state_dict()) == keys
    for size in ((8, 8), (13, 18), (64, 40)):
        levels = decoder_inputs(size)
        torch.testing.assert_close(model(*levels), reference(*levels), rtol=1e-4, atol=1e-5)
    assert model.forward.__func__ is not Decoder.forward
    twin = copy.deepcopy(model)
    assert twin.forward.__func__ is model.forward.__func__
    nn.init.zeros_(twin.classify.weight)
    nn.init.zeros_(twin.classify.bias)
    assert not twin(*levels).any()
    again = pickle.loads(pickle.dumps(model))
    assert again.forward.__func__ is Decoder.forward
    seen: list[Any] = []
    handle = model.fuse[0].register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape)
    )
    torch.testing.assert_close(model(*levels), reference(*levels), rtol=1e-4, atol=1e-5)
    assert seen == [(2, 24, 64, 40)]
    handle.remove()
    assert fastfuse.revert(model)[0] == ""
    assert torch.equal(model(*levels), reference(*levels))


def test_what_is_changed_afterwards_counts() -> None:
    model = randomized(Decoder()).eval()
    reference, levels = copy.deepcopy(model), decoder_inputs()
    fastfuse.convert(model)
    for changed in (model, reference):
        changed.corners = True
    torch.testing.assert_close(model(*levels), reference(*levels), rtol=1e-4, atol=1e-5)
    for changed in (model, reference):
        torch.manual_seed(1)
        changed.corners = False
        changed.lateral = changed.lateral[:2]
        changed.fuse = nn.Conv2d(16, 8, 1)
    args = levels[:2]
    expected = reference(*args, levels[2])
    torch.testing.assert_close(model(*args, levels[2]), expected, rtol=1e-4, atol=1e-5)


def test_graphs() -> None:
    model, levels = randomized(Decoder()).eval(), decoder_inputs()
    expected = model(*levels)
    fastfuse.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*levels), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, levels)
    assert "fastfuse.fusion_conv2d" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*levels), expected, rtol=1e-4, atol=1e-5)


def body(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([F.interpolate(x, size=y.shape[2:], mode="bilinear"), y], dim=1)


class _Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 8, 1)


class AsksTraining(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(F.interpolate(x, size=y.shape[2:], mode="bilinear"), 0.5, self.training)
        return self.conv(torch.cat([x, y], dim=1))


class ChecksNone(_Conv):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            y = x[:, :4]
        x = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([x, y], dim=1))


class ChecksSizes(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:
            x = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([x, y], dim=1))


class Counts(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.steps = 1
        x = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([x, y], dim=1))


class Writes(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        up = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        F.relu(x, True)
        return self.conv(torch.cat([up, y], dim=1))


class Stops(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([x, y], dim=1))


class CallsAnother(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = body(x, y)[:, 8:]
        x = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([x, y], dim=1))


class Draws(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.interpolate(x, size=y.shape[2:], mode="bilinear") * torch.rand(1)
        return self.conv(torch.cat([x, y], dim=1))


class Loops(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        maps = [F.interpolate(m[None], size=y.shape[2:], mode="bilinear") for m in x]
        return self.conv(torch.cat([maps[0], y], dim=1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsksTraining, "asks for training"),
        (ChecksNone, "tests what is None"),
        (ChecksSizes, "is not traced by torch.fx: "),
        (Counts, "sets attributes"),
        (Writes, "writes into tensors"),
        (Stops, "asks for no_grad"),
        (CallsAnother, "calls body"),
        (Draws, "asks for rand"),
        (Loops, "loops over an input"),
    ],
)
def test_what_is_left(kind: type[nn.Module], reason: str) -> None:
    model = kind()
    state = dict(model.__dict__)
    report = fastfuse.convert(model)
    assert report.left[""].startswith(reason)
    assert model.__dict__ == state


class WritesByAChild(nn.Module):
    """The upsampled map is taken before a child changes what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        up = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        return self.conv(torch.cat([up, y], dim=1)) + self.act(x).sum()


class WritesBefore(WritesByAChild):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        up = F.interpolate(x, size=y.shape[2:], mode="bilinear")
        total = self.act(x).sum()
        return self.conv(torch.cat([up, y], dim=1)) + total


class Nearest(_Conv):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.interpolate(x, size=y.shape[2:])
        return self.conv(torch.cat([x, y], dim=1))


def test_chains_that_are_none() -> None:
    x, y = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 8, 8)
    for kind, is_chain in ((WritesByAChild, True), (WritesBefore, False), (Nearest, False)):
        model = kind()
        expected = model(x.clone(), y)
        assert ("" in fastfuse.convert(model).converted) == is_chain
        torch.testing.assert_close(model(x.clone(), y), expected, rtol=1e-4, atol=1e-5)
