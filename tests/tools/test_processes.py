"""Training whole models in two processes, through gloo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastfuse import explain, heads
from fastfuse.models import CEDNetClassifier, Segmentor
from fastfuse.models.evaluation import in_evaluation

CLASSES = 3


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.norm(self.conv(images))]


def segmentor() -> Segmentor:
    decode, auxiliary = (
        heads.FCNHead(4, 4, CLASSES, num_convs=1, concat_input=False, dropout=0.0) for _ in range(2)
    )
    model = Segmentor(Backbone(), decode, auxiliary, auxiliary_index=0).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # batch statistics are a rank's own
    return model


def classifier() -> CEDNetClassifier:
    return CEDNetClassifier("tiny", CLASSES, depths=(1, 1, 1, 1), channels=(8, 8, 8, 8)).double()


def segmentation() -> tuple[Tensor, Tensor]:
    """As many pixels are ignored in the first rank's half as in the second's."""
    images, targets = torch.randn(4, 3, 8, 8), torch.randint(CLASSES, (4, 8, 8))
    targets[::2, :2] = 255
    return images.double(), targets


def classification() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32).double(), torch.randint(CLASSES, (4,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "segmentor": (segmentor, segmentation),
    "classifier": (classifier, classification),
}


def fused_segmentor() -> tuple[nn.Module, Tensor, Tensor]:
    """With a fusion, whose convolution is a child."""
    torch.manual_seed(0)
    decode = heads.FCNHead(4, 4, CLASSES, num_convs=1, dropout=0.0, norm=nn.InstanceNorm2d)
    backbone = Backbone()
    backbone.norm = nn.Identity()
    return (Segmentor(backbone, decode).double(), *segmentation())


WITH_CHILDREN: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "fused segmentor": fused_segmentor,
    "classifier": lambda: made("classifier"),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    return (make(), *batch())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def stepped(model: nn.Module, images: Tensor, targets: Tensor) -> list[Tensor]:
    """Parameters after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images, targets).backward()
    optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results: dict[str, Any] = {}
    half = slice(2 * rank, 2 * rank + 2)
    for name in MODELS:
        model, images, targets = made(name)
        wrapped = DistributedDataParallel(model)
        wrapped(images[half], targets[half]).backward()
        results[name] = gradients(model)
        model.zero_grad()
        wrapped.module.loss(images[half], targets[half]).backward()
        results[f"{name}, past the wrapper"] = gradients(model)

    from torch.distributed.fsdp import fully_shard

    for name in MODELS:
        model, images, targets = made(name)
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        fully_shard(model.backbone, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results[f"{name}, sharded"] = stepped(model, images[half], targets[half])
        model.train()
        with torch.no_grad():
            results[f"{name}, sharded, evaluated"] = in_evaluation("test", model)(images)

    for name in WITH_CHILDREN:
        model, images, targets = WITH_CHILDREN[name]()
        for child in model.modules():
            if not list(child.children()) and list(child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results[f"{name}, children sharded"] = stepped(model, images[half], targets[half])

    model, images, targets = made("segmentor")
    plain = copy.deepcopy(model).eval()
    model.backbone = DistributedDataParallel(model.backbone)
    model.train()
    if rank == 0:  # alone: DistributedDataParallel's forward would wait for the other's buffers
        results["predicted by one rank"] = torch.equal(model.predict(images), plain.predict(images))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_two_ranks_are_the_whole_batch_s(
    ranks: list[dict[str, Any]], name: str
) -> None:
    model, images, targets = made(name)
    model(images, targets).backward()
    for first, second, expected in zip(
        ranks[0][name], ranks[1][name], gradients(model), strict=True
    ):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_loss_past_the_wrapper_is_a_rank_s_own(ranks: list[dict[str, Any]], name: str) -> None:
    """What the docs warn of: gradients that no one averaged."""
    first, second = (rank[f"{name}, past the wrapper"] for rank in ranks)
    assert sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) > 3


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_step_is_the_plain_one(ranks: list[dict[str, Any]], name: str) -> None:
    model, images, targets = made(name)
    for first, second, expected in zip(
        ranks[0][f"{name}, sharded"],
        ranks[1][f"{name}, sharded"],
        stepped(model, images, targets),
        strict=True,
    ):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", WITH_CHILDREN)
def test_sharded_children(ranks: list[dict[str, Any]], name: str) -> None:
    """Children gather their weights when they are called, so that they are."""
    model, images, targets = WITH_CHILDREN[name]()
    assert None in explain(model).values()
    expected = stepped(model, images, targets)
    for rank in ranks:
        for found, wanted in zip(rank[f"{name}, children sharded"], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_of_sharded_models(ranks: list[dict[str, Any]], name: str) -> None:
    model, images, targets = made(name)
    stepped(model, images, targets)
    expected = model.eval()(images)
    for rank in ranks:
        found = rank[f"{name}, sharded, evaluated"]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_one_rank_predicts_with_a_wrapped_backbone(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["predicted by one rank"]
