"""A run: from random weights, or from its own checkpoint, to the last epoch."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastfuse
from examples.camvid import checkpoint
from examples.camvid.augmentation import epoch_batches, seed_of
from examples.camvid.checkpoint import State
from examples.camvid.config import DTYPES, Config
from examples.camvid.data import DataSet
from examples.camvid.models import build
from examples.camvid.pipeline import Objective, running
from examples.camvid.processes import Processes
from examples.camvid.progress import Meter
from examples.camvid.scores import evaluate
from fastfuse.calibration.equalizers import find_fusions
from fastfuse.models import Segmentor

__all__ = ["GRADIENT_STEPS", "identity_of", "model_of", "train"]

GRADIENT_STEPS = 50  # whose gradients' scale is kept
_CALIBRATION_BATCHES = 16
_WARMUP = 0.05  # of all steps, in which the learning rate rises
_POWER = 0.9  # with which it falls: "poly", as in the papers of the heads
_SHOWN = 20  # steps whose mean loss is shown
_DECAY = 0.05  # of weights
# Larger than AdamW's usual 1e-8, which makes full steps of gradients that are rounding and no more,
# such as those of a branch pooled to one value an image where the batch is small.
_EPSILON = 1e-5


def train(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    processes: Processes | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> tuple[Segmentor, State]:
    """Trains, or goes on from the last epoch that ``out`` has, and scores the test images.

    Everything random is a function of seed, epoch, process and image, so that a run that was
    interrupted ends in the same bits as one that was not, at the same number of threads.

    Args:
        config: what to train.
        data: of what.
        out: folder of checkpoints; one of another configuration is refused.
        processes: this one's place; None: it is alone.
        workers: processes that read images, each.
        console: where progress goes; None: nowhere.

    Raises:
        ValueError: a bad image or label, which is named; a checkpoint that does not fit.
        OSError: a checkpoint cannot be written.
        FloatingPointError: a loss that is no number.

    In all of these cases the last checkpoint stands.
    """
    processes = processes or Processes()
    console = console if console is not None and processes.first else Console(quiet=True)
    run = _Run(config, data, processes, processes.device(), workers)
    with checkpoint.claimed(out) if processes.first else nullcontext():
        return _train(run, out, console)


def _train(run: _Run, out: Path, console: Console) -> tuple[Segmentor, State]:
    config, data, processes = run.config, run.data, run.processes
    state = State(identity_of(config, data, processes))
    found = checkpoint.load_state(out, state.identity)
    for name, split in data.splits.items():
        if name != "train":
            split.check_labelled()
    fold = found is None and config.scale_equalizer == "fold"
    model = model_of(config, data, equalizers=fold).to(run.device)
    processes.normalize(model, run.device)
    with running(config.pipeline):
        if found is None and config.scale_equalizer != "none":
            fastfuse.calibrate(model, _calibration_images(run), progress=False)
        if fold:
            fastfuse.fold_scale_equalizers(model, keep_mean=False)
        optimizer = _optimizer(model, config)
        if found is not None:
            state = found
            checkpoint.restore(out, state, model, optimizer)
            done = f"{out}: {state.epoch} of {config.epochs} epochs are done"
            console.print(done, markup=False)
        objective = processes.wrapped(Objective(model, config.pipeline))
        last = state.history[-1]["miou"] if state.history else None
        with Meter(console, config.epochs, state.epoch, last) as meter:
            while state.epoch < config.epochs:
                entry = _epoch(run, objective, optimizer, state, meter)
                processes.share_buffers(model)
                entry |= _scores(run, model, "val")
                state.history.append(entry)
                state.epoch += 1
                if processes.first:
                    checkpoint.save_state(out, state, model, optimizer)
                meter.epoch(entry)
        if state.test is None and "test" in data.splits:
            state.test = _scores(run, model, "test")
            if processes.first:
                checkpoint.write_index(out, state)
    return model, state


def identity_of(config: Config, data: DataSet, processes: Processes) -> dict[str, Any]:
    """All that a checkpoint must share with the run that goes on from it."""
    return {**config.identity(), "data": data.fingerprint(), "processes": processes.world}


def model_of(config: Config, data: DataSet, *, equalizers: bool = False) -> Segmentor:
    """The model of a configuration; a folded one has equalizers only before it is folded."""
    torch.manual_seed(config.seed)
    return build(
        config.head,
        config.backbone,
        data.void,
        config.channels,
        output_stride=config.output_stride,
        scale_equalizer=equalizers or config.scale_equalizer == "module",
        ignore_index=data.void,
    )


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Of one step of all: a linear rise, then a fall to nearly 0."""
    warmup = max(round(_WARMUP * steps), 1)
    return config.lr * min((step + 1) / warmup, (1 - step / steps) ** _POWER)


def gradient_scales(model: nn.Module) -> dict[str, float]:
    """RMS of the gradient of every branch's part of every fusion's weight, by "fusion:level"."""
    scales = {}
    for name, fusion in find_fusions(model).items():
        name = name[name.index("decode_head") :]  # whatever wraps the model
        gradient = fusion.level_weight.grad
        assert gradient is not None
        parts = gradient.float().split(list(fusion.in_channels), fusion.level_axis)
        for level, part in enumerate(parts):
            scales[f"{name}:{level}"] = float(part.square().mean().sqrt())
    return scales


@dataclass(frozen=True)
class _Run:
    """What stays the same."""

    config: Config
    data: DataSet
    processes: Processes
    device: torch.device
    workers: int

    def batches(self, epoch: int) -> DataLoader[tuple[Tensor, Tensor]]:
        return epoch_batches(
            self.data.splits["train"],
            self.config.crop,
            self.config.batch,
            seed=self.config.seed,
            epoch=epoch,
            rank=self.processes.rank,
            world=self.processes.world,
            workers=self.workers,
        )

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, self.config.dtype != "float32")


def _calibration_images(run: _Run) -> Iterator[Tensor]:
    """Those of the first batches that training will see."""
    for images, _ in islice(run.batches(0), _CALIBRATION_BATCHES):
        yield images.to(run.device)


def _scores(run: _Run, model: Segmentor, split: str) -> dict[str, Any]:
    with run.autocast():
        scores = evaluate(
            model,
            run.data.splits[split],
            run.config.pipeline,
            run.config.batch,
            run.device,
            run.processes,
        )
    return scores.entry()


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [  # of norms, biases and layer scales nothing decays
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, eps=_EPSILON)


def _epoch(
    run: _Run,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    meter: Meter,
) -> dict[str, Any]:
    """One pass over the training images; what to keep of it."""
    config, epoch = run.config, state.epoch
    torch.manual_seed(seed_of(config.seed, epoch, run.processes.rank))
    objective.train()
    batches = run.batches(epoch)
    steps = len(batches)
    losses: list[float] = []
    seconds: list[float] = []
    for index, (images, targets) in enumerate(batches):
        start = time.perf_counter()
        step = epoch * steps + index
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.epochs * steps)
        with run.autocast():
            loss = objective(images.to(run.device), targets.to(run.device))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"camvid: the loss must be finite; got {losses[-1]} in step {index + 1} of epoch "
                f"{epoch + 1}; a smaller --lr may help"
            )
        optimizer.zero_grad()
        loss.backward()
        if step < GRADIENT_STEPS:
            for branch, scale in gradient_scales(objective).items():
                state.gradients.setdefault(branch, []).append(scale)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        rate = config.batch * run.processes.world / statistics.median(seconds)
        meter.step(statistics.fmean(losses[-_SHOWN:]), rate, steps)
    return {
        "epoch": epoch + 1,
        "loss": statistics.fmean(losses),
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "images_per_second": rate,
        "peak_mib": _peak_mib(run.device),
    }


def _peak_mib(device: torch.device) -> float:
    """Of the process, or of the GPU's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
