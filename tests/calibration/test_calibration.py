"""calibrate: values, what it leaves alone, several processes, files, bad input."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from small_models import (
    DETAIL,
    POOLING,
    TOP_DOWN,
    Backbone,
    Bare,
    Model,
    Pair,
    assert_same_state,
    camvid_batches,
    levels_seen,
    random_batches,
    state,
    two_pass,
)
from torch import Tensor, nn

import fastfuse
from fastfuse import BranchStatistics, calibrate, load_calibration, save_calibration
from fastfuse.calibration.moments import Moments, image_moments
from fastfuse.nn import MultiLevelFusion, ScaleEqualizer, SeparableFusion
from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.policy import policy_of, use_policy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These models are too small for more."""
    torch.set_num_threads(1)


# ---- values: moments of a branch ----------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("own", "size"),
    [
        ((4, 6), (16, 24)),
        ((3, 5), (10, 7)),
        ((1, 1), (9, 8)),
        ((2, 7), (2, 7)),
        ((5, 4), (5, 9)),
        ((1, 3), (4, 1)),
        ((9, 8), (4, 3)),  # downwards: positions that are not read
        ((9, 2), (1, 17)),
        ((1, 1), (1, 1)),
        ((7, 5), (16, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_of_an_upsampled_branch(
    own: tuple[int, int], size: tuple[int, int], align_corners: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(3, 5, *own) + 100).to(dtype)
    mean, variance = image_moments(x, size, align_corners=align_corners)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    up = interpolate_exactly(x, size, align_corners=align_corners, coordinates=coordinates)
    torch.testing.assert_close(mean, up.mean((1, 2, 3)), rtol=1e-14, atol=0)
    expected = up.var((1, 2, 3), correction=0)
    torch.testing.assert_close(variance, expected, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_in_chunks(channels_last: bool) -> None:
    x = torch.randn(2, 11, 6, 5)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for size in ((12, 20), (6, 5), (3, 2)):
        up = interpolate_exactly(x, size)
        with use_policy(policy_of("cpu"), moments_values=100):
            mean, variance = image_moments(x, size)
        torch.testing.assert_close(mean, up.mean((1, 2, 3)), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(variance, up.var((1, 2, 3), correction=0), rtol=1e-13, atol=0)


def test_nothing_cancels() -> None:
    """A mean a billion times the standard deviation, which E[x²] - mean² would lose."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = image_moments(x, (32, 32))[1]
    shifted = image_moments(x + 1e9, (32, 32))[1]
    torch.testing.assert_close(shifted, expected, rtol=1e-5, atol=0)
    images = [Moments.of_image(1e9 + i, 1.0) for i in range(4)]
    total = Moments()
    for image in images:
        total += image
    assert (total.count, total.mean) == (4, 1e9 + 1.5)
    assert total.variance == pytest.approx(2.25, rel=1e-12)


# ---- values: calibrate --------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
def test_statistics_are_those_of_two_passes(align_corners: bool) -> None:
    """On real images; the oracle upsamples in float64 and takes the mean before the variance."""
    batches = camvid_batches(3)
    model = Model(align_corners=align_corners)
    expected = {(n, i): two_pass(t) for n, i, t in levels_seen(model, batches)}
    statistics = calibrate(model, [(batch, "labels") for batch in batches])
    assert list(statistics) == [POOLING, TOP_DOWN, DETAIL]
    assert len(expected) == 4 + 3 + 2
    for (name, level), (mean, std) in expected.items():
        found = statistics[f"{name}.equalizer"]
        assert found.count[level] == 9
        assert found.mean[level] == pytest.approx(mean, rel=1e-6, abs=1e-9)
        assert found.std[level] == pytest.approx(std, rel=1e-6)
    for name, found in statistics.items():
        module = model.get_submodule(name)
        torch.testing.assert_close(module.mean, torch.tensor(found.mean), rtol=0, atol=0)
        torch.testing.assert_close(module.std, torch.tensor(found.std), rtol=0, atol=0)


def test_branches_are_equalized_on_the_same_images() -> None:
    """Exactly for branches that no equalized fusion comes before; nearly for the nested ones."""
    batches = camvid_batches(3)
    model = Model()
    calibrate(model, batches)
    nested = {("decode_head.fpn_bottleneck", 2), ("decode_head.detail", 0)}
    for name, level, tensors in levels_seen(model, batches):
        mean, std = two_pass(tensors)
        margin = 0.5 if (name, level) in nested else 1e-6
        assert mean == pytest.approx(0, abs=margin), (name, level)
        assert std == pytest.approx(1, abs=margin), (name, level)


def test_a_whole_head() -> None:
    """UPerHead in a Segmentor: its inner fusion exactly, as the outer one's inputs were."""
    head = fastfuse.heads.UPerHead([8, 12, 16], 8, 5, pool_scales=(1, 2), scale_equalizer=True)
    model = fastfuse.models.Segmentor(Backbone(), head)
    batches = random_batches(2, 4, 48)
    expected = {(n, i): two_pass(t) for n, i, t in levels_seen(model, batches)}
    statistics = calibrate(model, batches)
    assert set(statistics) == {POOLING, TOP_DOWN}
    for (name, level), (mean, std) in expected.items():
        found = statistics[f"{name}.equalizer"]
        assert (found.mean[level], found.std[level]) == pytest.approx((mean, std), rel=1e-6)
    images = batches[0]
    with torch.no_grad():
        before = model.eval()(images)
        fastfuse.fold_scale_equalizers(model)
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [MultiLevelFusion, SeparableFusion])
def test_images_of_different_sizes_weigh_the_same(kind: Any) -> None:
    model = Pair(kind([3, 3], 4, scale_equalizer=True))
    batches = [torch.randn(2, 3, 8, 8), 3 * torch.randn(2, 3, 32, 32) + 1]
    found = calibrate(model, iter(batches), encoder=None)["fusion.equalizer"]
    mean, std = two_pass([batch.double() for batch in batches])
    assert (found.mean[0], found.std[0]) == pytest.approx((mean, std), rel=1e-12)
    assert found.count == (4, 4)


def test_an_equalizer_that_stands_alone() -> None:
    model = Bare()
    batches = random_batches()
    found = calibrate(model, batches, encoder=None)["equalizer"]
    mean, std = two_pass([batch.double() for batch in batches])
    assert found.mean == pytest.approx((mean, 3 * mean + 1), rel=1e-6)
    assert found.std == pytest.approx((std, 3 * std), rel=1e-6)


def test_every_use_counts() -> None:
    class Twice(Pair):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + super().forward(2 * images)

    model = Twice(MultiLevelFusion([3, 3], 4, scale_equalizer=True))
    batches = random_batches()
    found = calibrate(model, batches, encoder=None)["fusion.equalizer"]
    mean, std = two_pass([b.double() * scale for b in batches for scale in (1, 2)])
    assert found.count == (8, 8)
    assert (found.mean[0], found.std[0]) == pytest.approx((mean, std), rel=1e-6)


def test_max_batches_and_wrappers() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for batch in random_batches(5):
            taken.append(batch)
            yield batch

    model = Model()
    twin = copy.deepcopy(model)
    statistics = calibrate(nn.DataParallel(model), batches(), max_batches=2)
    assert len(taken) == 2
    assert statistics == calibrate(twin, taken, encoder=twin.backbone)
    assert statistics[POOLING].count == (4, 4, 4, 4)
    again = calibrate(model, taken)  # from calibrated equalizers as from fresh ones
    assert again == statistics


# ---- what it leaves alone -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_everything_else_is_as_it_was(training: bool) -> None:
    model = Model().train(training)
    model.decode_head.pools.eval()
    model.decode_head.dropout.train()
    before = state(model)
    images = torch.randn(4, 3, 32, 32)
    random = torch.get_rng_state()
    modes: dict[str, bool] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, name=name: modes.update({name: module.training})
        )
    before["hooks"] = state(model)["hooks"]
    calibrate(model, torch.utils.data.DataLoader(images, 2, shuffle=True))
    assert_same_state(model, before, but="equalizer")
    assert torch.equal(torch.get_rng_state(), random)
    assert not modes["backbone.stages.0.1"]
    assert not modes["decode_head.dropout"]
    assert modes["decode_head.pools.0.1.bn"]
    assert modes["decode_head.detail.pointwise_conv.bn"]


class Breaking:
    """Batches of which one fails, a forward that fails, or a write that fails."""

    @staticmethod
    def data(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
        yield from random_batches(1)
        raise KeyError("broken")

    @staticmethod
    def forward(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        calls = []

        def fail(module: Any, args: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyError("broken")

        model.decode_head.conv_seg.register_forward_pre_hook(fail)
        return random_batches()

    @staticmethod
    def write(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        original = ScaleEqualizer.set_statistics

        def fail(self: ScaleEqualizer, *args: Any) -> None:
            original(self, *args)
            if self is model.get_submodule(DETAIL):
                raise KeyError("broken")

        monkeypatch.setattr(ScaleEqualizer, "set_statistics", fail)
        return random_batches()


@pytest.mark.parametrize("breaking", [Breaking.data, Breaking.forward, Breaking.write])
def test_an_exception_leaves_the_model_as_it_was(
    breaking: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model().train()
    for name in (POOLING, TOP_DOWN, DETAIL):
        module = model.get_submodule(name)
        module.set_statistics(torch.rand(module.num_levels), torch.rand(module.num_levels) + 1)
    batches = breaking(model, monkeypatch)
    before = state(model)
    with pytest.raises(KeyError, match="broken"):
        calibrate(model, batches)
    assert_same_state(model, before)
    assert torch.is_grad_enabled()


# ---- several processes --------------------------------------------------------------------------


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results: dict[str, Any] = {}
    batches = random_batches(4)

    def attempt(name: str, model: nn.Module, mine: list[Any]) -> None:
        before = state(model)
        try:
            results[name] = calibrate(model, mine)
        except Exception as error:
            assert_same_state(model, before)
            results[name] = f"{type(error).__name__}: {error}"

    def fresh(**options: Any) -> Model:
        torch.manual_seed(0)
        return Model(**options)

    attempt("split", fresh(), batches[2 * rank :][:2])
    attempt("sync", fresh(norm=nn.SyncBatchNorm), batches[:3] if rank == 0 else batches[3:])
    attempt("one", fresh(), batches if rank == 1 else [])
    attempt("none", fresh(), [])
    attempt("bad batch", fresh(), ["nonsense"] if rank == 1 else batches)
    attempt("other model", fresh() if rank == 0 else fresh(scale_equalizer=False), batches)
    broken = fresh()
    if rank == 0:
        broken.get_submodule(DETAIL).set_statistics = lambda *args: 1 / 0
    attempt("write", broken, batches)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    expected = calibrate(Model(), random_batches(4))
    for name in ("split", "sync", "one"):
        assert ranks[0][name] == ranks[1][name]  # every bit
        for equalizer, statistics in expected.items():
            found = ranks[0][name][equalizer]
            assert found.mean == pytest.approx(statistics.mean, rel=1e-12, abs=1e-12)
            assert found.std == pytest.approx(statistics.std, rel=1e-12)
            assert found.count == statistics.count
    for rank in ranks:
        assert "no batches" in rank["none"]
        assert "batch 0 must be a tensor of images" in rank["bad batch"]
        assert "has no scale equalizers" in rank["other model"]
        assert "ZeroDivisionError" in rank["write"]
    assert ranks[0]["bad batch"].startswith("RuntimeError: calibrate: rank 1 failed: TypeError")


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_files_round_trip(suffix: str, tmp_path: Path) -> None:
    model = Model()
    statistics = calibrate(model, random_batches())
    path = tmp_path / f"equalizers.{suffix}"
    save_calibration(statistics, path)
    other = Model()
    assert load_calibration(other, str(path)) == statistics
    for name in statistics:
        for field in ("mean", "std"):
            ours, theirs = (getattr(m.get_submodule(name), field) for m in (model, other))
            assert torch.equal(ours, theirs)
    if suffix == "json":
        assert json.loads(path.read_text())["equalizers"][POOLING]["count"] == [4] * 4


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_files_that_do_not_fit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"equalizers.{suffix}"
    model = Model()
    one = BranchStatistics((0.5,), (2.0,), (4,))
    two = BranchStatistics((0.5, 0.5), (2.0, 2.0), (4, 4))
    three = BranchStatistics((0.5,) * 3, (2.0,) * 3, (4,) * 3)
    four = BranchStatistics((0.5,) * 4, (2.0,) * 4, (4,) * 4)
    wrong = BranchStatistics((0.5, 0.5), (2.0, -2.0), (4, 4))
    for statistics, *messages in (
        ({POOLING: four, "other": one}, f"lacks: ['{DETAIL}', '{TOP_DOWN}']", "lacks: ['other']"),
        ({POOLING: one, TOP_DOWN: three, DETAIL: two}, f"{POOLING} has 4 levels in the model, 1"),
        ({POOLING: four, TOP_DOWN: three, DETAIL: wrong}, "std must be positive"),
    ):
        save_calibration(statistics, path)
        before = state(model)
        for message in (str(path), *messages):
            with pytest.raises(ValueError, match=re.escape(message)):
                load_calibration(model, path)
        assert_same_state(model, before)
    for content in ("", "{}", "[1, 2]", '{"format": "fastfuse scale equalizers", "version": 9}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is not a file of save_calibration"):
            load_calibration(model, path)


def test_files_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must end in .json or .safetensors; got 'x.pt'"):
        save_calibration({}, "x.pt")
    for name in ("a.json", "a.safetensors"):
        with pytest.raises(FileNotFoundError):
            load_calibration(Model(), tmp_path / name)
    damaged = {POOLING: {"mean": [1.0], "std": ["wide"], "count": [1]}}
    document = {"format": "fastfuse scale equalizers", "version": 1, "equalizers": damaged}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{POOLING} must have as many numbers"):
        load_calibration(Model(), tmp_path / "a.json")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"need the package safetensors; pip install"):
        save_calibration({}, tmp_path / "a.safetensors")


# ---- bad input ----------------------------------------------------------------------------------


def fusion_pair() -> Pair:
    return Pair(MultiLevelFusion([3, 3], 4, scale_equalizer=True))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batches; give at least one batch of 2 images"),
        ([torch.randn(1, 3, 8, 8)], ValueError, r"batch 0 must have at least 2 images; got 1\. A "),
        (
            [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)],
            ValueError,
            "batch 1 must have .*BatchNorm.*cannot normalize a single value.*16.*drop_last=True",
        ),
        (["a"], TypeError, "batch 0 must be a tensor of images or a tuple or list .*; got str"),
        ([{"image": 1}], TypeError, "got dict"),
        ([([1], 2)], TypeError, "got list"),
        ([torch.randn(3, 8, 8)], ValueError, r"shape \(N, C, H, W\); got torch.float32 of shape"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], ValueError, "floating-point images"),
        (
            [torch.full((2, 3, 8, 8), 0.1)],
            ValueError,
            r"fusion.equalizer, branch 0: expected a branch that varies.*; got variance 0",
        ),
        (
            [torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("nan"))],
            ValueError,
            r"fusion.equalizer, branch 1: .*finite values; got mean nan and variance nan",
        ),
    ],
)
def test_bad_batches(batches: list[Any], error: type[Exception], message: str) -> None:
    model = fusion_pair()
    before = state(model)
    with pytest.raises(error, match=f"^calibrate: .*{message}"):
        calibrate(model, batches, encoder=None)
    assert_same_state(model, before)


def test_bad_models() -> None:
    batches = random_batches()
    with pytest.raises(ValueError, match=r"has no scale equalizers; .*scale_equalizer=True"):
        calibrate(Model(scale_equalizer=False), batches)
    with pytest.raises(ValueError, match=r"no module 'backbone'; give encoder= .*'fusion'"):
        calibrate(fusion_pair(), batches)
    with pytest.raises(ValueError, match=r"no module 'backbone.body'"):
        calibrate(Model(), batches, encoder="backbone.body")
    with pytest.raises(ValueError, match="encoder must be a module of the model"):
        calibrate(Model(), batches, encoder=nn.Identity())
    with pytest.raises(ValueError, match="max_batches must be at least 1; got 0"):
        calibrate(Model(), batches, max_batches=0)
    model = Model()
    model.spare = MultiLevelFusion([3], 4, scale_equalizer=True)
    with pytest.raises(ValueError, match=r"spare.equalizer was never reached in the forward pass"):
        calibrate(model, batches)


def test_the_fusions_own_errors_come_through() -> None:
    with pytest.raises(ValueError, match=r"MultiLevelFusion: expected levels with \(3, 4\)"):
        calibrate(
            Pair(MultiLevelFusion([3, 4], 4, scale_equalizer=True)), random_batches(), encoder=None
        )
