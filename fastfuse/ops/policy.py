"""Whatever depends on the machine: facts about it, and every size and crossover that follows.

A policy holds for one kind of device. That of CPUs is chosen once, at import, by the instruction
set of the kernels: sizes follow from the caches, crossovers are ratios of rates that were measured
on one processor of the class, which ``measured`` names; nothing is timed at run time. Ops ask
:func:`policy_of`; the compiled kernels are told their part of it (:class:`KernelSizes`).

===============  ===================================================================================
``portable``     as ``avx2``, which is its nearest relative
``avx2``         measured on AMD EPYC, Zen 3
``avx512``       as ``avx512_bf16``, but bfloat16 is multiplied in float32
``avx512_bf16``  measured on AMD EPYC, Zen 4
``cuda``         never measured: orders of magnitude, and counts over an H100's rates
===============  ===================================================================================
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastfuse import _extension
from fastfuse.backends import DTYPES, accumulation_dtype
from fastfuse.ops.costs import CPU_COSTS, GPU_COSTS, GPU_TF32_COSTS, FusionCosts

__all__ = [
    "CPU_CLASSES",
    "KernelSizes",
    "Machine",
    "Policy",
    "WinogradRule",
    "cpu_policy",
    "policy_of",
    "use_isa",
    "use_policy",
]

CPU_CLASSES = ("portable", "avx2", "avx512", "avx512_bf16")

KIB, MIB = 1 << 10, 1 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """Facts about a CPU. Caches in bytes: a core's first and second level, the last level."""

    isa: str = "portable"  # of the kernels: one of CPU_CLASSES
    vendor: str = "unknown"
    cores: int = 1
    l1: int = 32 * KIB
    l2: int = 512 * KIB
    l3: int = 8 * MIB
    # oneDNN multiplies bfloat16 by instructions made for it, or by others that emulate them
    onednn_bfloat16: bool = False

    @classmethod
    def here(cls) -> Machine:
        """This machine's; what the system does not tell is as in the class's defaults."""
        caches = _cache_sizes(_CACHES)
        fallback = cls()
        has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return cls(
            isa=_extension.module.isa() if _extension.module else fallback.isa,
            vendor=_vendor() or fallback.vendor,
            cores=os.cpu_count() or fallback.cores,
            l1=caches.get(1, fallback.l1),
            l2=caches.get(2, fallback.l2),
            # Some have no third level: then the second is the last.
            l3=caches.get(3, max(caches.values(), default=fallback.l3)),
            onednn_bfloat16=has_bfloat16 is not None and bool(has_bfloat16()),
        )


def _cache_sizes(folder: Path) -> dict[int, int]:
    """Bytes of the data caches by level, as Linux tells; elsewhere none."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match and int(match[1]) > 0:
            sizes[int(level)] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return sizes


def _vendor() -> str | None:
    try:
        match = re.search(r"^vendor_id\s*:\s*(\S+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else platform.machine() or None


@dataclass(frozen=True)
class KernelSizes:
    """What the compiled CPU kernels are told.

    Results never depend on them but for sums over pixels, whose order is that of the tiles.
    """

    ring_bytes: int  # rows that a tile of a channels_last image works on
    depthwise_ring_bytes: int  # the same for a depthwise convolution's
    stream_bytes: int  # outputs from here on are written past the caches
    grain: int  # values worth waking a thread for
    depthwise_grain: int  # multiply-adds
    mlp_bytes: int  # of a tile's pixels between an MLP's products
    mlp_parts: int  # of pixels, each with sums of its own for the parameters' gradients


@dataclass(frozen=True)
class WinogradRule:
    """Where Winograd's algorithm is faster than the convolution of PyTorch, for one dtype."""

    channels: int  # at least so many in and out
    # What the fewer products save must pay for transforming the weights, which takes what so many
    # pixels save,
    pixels: int
    # and for the rest: products of the pixels above that with the channels in and out.
    work: int


@dataclass(frozen=True)
class Policy:
    """The crossovers, chunks and sizes of one kind of device.

    MACs are multiply-adds of a large matrix product, the unit in which work of other kinds is
    counted; bytes are of memory that should stay in a cache.
    """

    measured: str  # on which processor
    machine: Machine | None  # None on GPUs

    # ---- matrix products ----
    # dtypes that the libraries multiply by instructions made for them. Narrower ones are multiplied
    # in float32, a chunk converted at a time, and rounded once.
    native: frozenset[torch.dtype]
    onednn: frozenset[torch.dtype]  # those that oneDNN multiplies faster than torch.mm
    packing_rows: int  # from which packing a weight for oneDNN pays: 0.1 ms and 1 ns a weight
    convert_bytes: int  # of rows converted to the dtype of products at a time
    wide_results: bool  # torch.mm gives the float32 sums of products of narrower dtypes
    cudnn: bool  # convolutions are cuDNN's, where PyTorch has it

    # ---- blocks ----
    hidden_bytes: int  # of a chunk's hidden tensor: long enough for products, short enough to stay
    hidden_rows: int  # of a chunk, at least; shorter products are slow
    # dtypes whose MLPs are one kernel of ours, products included, instead of a library's
    whole_mlp: frozenset[torch.dtype]
    # backward, from so many pixels a channel on in each of KernelSizes.mlp_parts: the sums of parts
    # take their time, and no more than so many bytes
    whole_mlp_pixels: float
    whole_mlp_bytes: int

    # ---- GPUs: ops that CUDA C++ runs where it covers them, and not Triton ----
    cuda_ops: frozenset[str]
    # dtypes of products that are our own, with what follows them, instead of a library's
    fused_linear: frozenset[torch.dtype]

    # ---- fusion_conv2d: where a level is convolved ----
    fusion_costs: Mapping[torch.dtype, FusionCosts]
    tf32_costs: FusionCosts | None  # of float32 that products round to TF32
    # of a pixel and pair of channels of a 3x3 convolution, transforms included
    winograd_macs: float
    taps_bytes: int  # of a chunk of output channels
    # Narrow dtypes: levels of so few of the target's pixels are multiplied in float32, which takes
    # little there, and their taps kept in two parts, so that they add no rounding error.
    exact_pixels: float
    # Multiply-adds at the target's resolution below which a call is bound by its overhead: "auto"
    # takes the reference. Not while compiling, where the question would be a condition on sizes.
    little_macs: int

    # ---- Winograd's algorithm ----
    winograd: Mapping[torch.dtype, WinogradRule]
    winograd_bytes: int  # of transformed inputs and outputs of a block

    # ---- depthwise_conv2d of dilation 1 without derivatives, by the library instead ----
    # (kernel_size, channels_last, values of the image, dtype) -> whether oneDNN is faster
    library_depthwise: Callable[[int, bool, int, torch.dtype], bool] = field(repr=False)

    # ---- calibration ----
    moments_values: int  # converted to float64 at a time

    kernels: KernelSizes | None = None  # None on GPUs

    def backward_is_whole(self, pixels: torch.Tensor, hidden: int) -> bool:
        """Whether the gradients of an MLP of (pixels, C) are one kernel of ours, as the MLP is."""
        if pixels.dtype not in self.whole_mlp or self.kernels is None:
            return False
        (count, channels), parts = pixels.shape, self.kernels.mlp_parts
        sums = 2 * channels * hidden * accumulation_dtype(pixels.dtype).itemsize * parts
        enough = count >= self.whole_mlp_pixels * channels * parts
        return enough and sums <= self.whole_mlp_bytes

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which products of ``dtype`` are computed."""
        return dtype if dtype in self.native else torch.float32


def _zen4_depthwise(kernel_size: int, channels_last: bool, values: int, dtype: torch.dtype) -> bool:
    """oneDNN's forward is not to be beaten where little is computed for each value that is read
    (small kernels on channels_last images), where a large image is read (in float32), and for
    kernels above 7, for which ours is the general one; it has no fast one for float64."""
    if dtype == torch.float64:
        return False
    if kernel_size > 7 or not channels_last:
        return kernel_size > 7
    if dtype == torch.bfloat16:
        return kernel_size <= 3
    return kernel_size <= 5 or values >= 1 << 20


def _zen3_depthwise(kernel_size: int, channels_last: bool, values: int, dtype: torch.dtype) -> bool:
    """Ours takes half to three quarters of oneDNN's time but for kernels above 7, and where a large
    channels_last image is read for little."""
    if dtype != torch.float32:
        return False
    return kernel_size > 7 or (kernel_size == 3 and channels_last and values >= 1 << 20)


def _cpu(machine: Machine) -> Policy:
    avx512 = machine.isa in ("avx512", "avx512_bf16")
    native = frozenset({torch.float64, torch.float32})
    bfloat16 = machine.isa == "avx512_bf16" and machine.onednn_bfloat16
    if bfloat16:
        native |= {torch.bfloat16}
    float32_rule = WinogradRule(channels=64, pixels=32, work=5_000_000)
    narrow_rule = WinogradRule(channels=384, pixels=8000, work=0)
    return Policy(
        measured="AMD EPYC, Zen 4" if avx512 else "AMD EPYC, Zen 3",
        machine=machine,
        native=native,
        # On Zen 3 torch.mm is as fast, and takes memory for its results.
        onednn=native - {torch.float64} if avx512 else frozenset(),
        packing_rows=4096,
        convert_bytes=3 * MIB,
        wide_results=False,
        cudnn=False,
        hidden_bytes=3 * MIB,
        hidden_rows=512,
        # Without FMA half as fast as the library; with AVX-512 not measured.
        whole_mlp=frozenset(DTYPES if machine.isa == "avx2" else ()),
        whole_mlp_pixels=1.5,
        whole_mlp_bytes=64 * MIB,
        cuda_ops=frozenset(),
        fused_linear=frozenset(),
        fusion_costs=dict.fromkeys(DTYPES, CPU_COSTS),
        tf32_costs=None,
        winograd_macs=2.5,
        taps_bytes=min(machine.l3 * 3 // 4, 24 * MIB),  # more would only be more memory
        exact_pixels=1 / 32,
        little_macs=4_000_000,
        winograd={
            # PyTorch has no fast convolution for float64, nor for what is not native.
            torch.float64: WinogradRule(channels=64, pixels=100, work=2_000_000),
            torch.float32: float32_rule,
            torch.bfloat16: narrow_rule if bfloat16 else float32_rule,
            torch.float16: float32_rule,
        },
        winograd_bytes=min(machine.l3, 2 * MIB * max(machine.cores, 2)),
        library_depthwise=_zen4_depthwise if avx512 else _zen3_depthwise,
        moments_values=1 << 20,
        kernels=KernelSizes(
            # Not smaller where the second level is: with 512 KiB, rings of 192 to 512 KiB take 1 to
            # 1.4 times as long as 768.
            ring_bytes=max(machine.l2 * 3 // 4, 768 * KIB),
            depthwise_ring_bytes=machine.l1 * 3 // 4,
            stream_bytes=machine.l3 // (2 if avx512 else 4),
            grain=16384,
            depthwise_grain=1 << 18,
            mlp_bytes=machine.l2 * 3 // 4,
            mlp_parts=machine.cores,
        ),
    )


_CUDA = Policy(
    measured="none: orders of magnitude",
    machine=None,
    native=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    onednn=frozenset(),
    packing_rows=0,
    convert_bytes=256 * MIB,
    wide_results=True,
    cudnn=True,
    hidden_bytes=256 * MIB,  # GPUs want chunks that fill them; the limit is for memory
    hidden_rows=512,
    whole_mlp=frozenset(),
    whole_mlp_pixels=0.0,
    whole_mlp_bytes=0,
    # By counted instructions, bytes and waves: docs/gpu_report.md.
    cuda_ops=frozenset({"tap_sum", "depthwise_conv2d", "upsample_cross_entropy"}),
    # By counted bytes: a library writes the hidden tensor, and what follows reads it, once more.
    fused_linear=frozenset({torch.bfloat16, torch.float16}),
    fusion_costs=GPU_COSTS,
    tf32_costs=GPU_TF32_COSTS,
    winograd_macs=2.5,
    taps_bytes=256 * MIB,
    exact_pixels=1 / 32,
    little_macs=0,
    winograd={},
    winograd_bytes=0,
    library_depthwise=lambda kernel_size, channels_last, values, dtype: False,
    moments_values=1 << 26,
)

_policies: dict[str, Policy] = {}
_entered: list[Policy] = []  # in force at import, then those of use_policy


def _kind(policy: Policy) -> str:
    return "cpu" if policy.machine else "cuda"


def _install(policy: Policy) -> None:
    """Makes it that of its kind of device, and tells the compiled kernels."""
    _policies[_kind(policy)] = policy
    if policy.kernels and _extension.module is not None:
        _extension.module.set_sizes(**dataclasses.asdict(policy.kernels))


def policy_of(device_type: str) -> Policy:
    """The policy of a kind of device; other accelerators have that of GPUs."""
    return _policies["cpu" if device_type == "cpu" else "cuda"]


def cpu_policy(machine: Machine | None = None) -> Policy:
    """The policy that follows from a machine's facts (default: this machine's).

    Raises:
        ValueError: an unknown instruction set.

    >>> cpu_policy(Machine(isa="avx2", l1=32 << 10)).kernels.depthwise_ring_bytes
    24576
    """
    machine = Machine.here() if machine is None else machine
    if machine.isa not in CPU_CLASSES:
        classes = ", ".join(CPU_CLASSES)
        raise ValueError(
            f"cpu_policy: machine.isa must be a class of processors ({classes}); "
            f"got {machine.isa!r}"
        )
    return _cpu(machine)


@contextmanager
def use_policy(policy: Policy, **changes: Any) -> Iterator[Policy]:
    """Another policy for its kind of device, with some fields changed, process-wide; for tests and
    experiments. No op may run while it changes.

    >>> with use_policy(policy_of("cpu"), little_macs=0) as policy:
    ...     policy.little_macs
    0
    """
    policy = dataclasses.replace(policy, **changes)
    _entered.append(policy)
    _install(policy)
    try:
        yield policy
    finally:  # not always the last: other threads enter and leave too
        _entered[:] = [other for other in _entered if other is not policy]
        _install(next(p for p in reversed(_entered) if _kind(p) == _kind(policy)))


@contextmanager
def use_isa(isa: str) -> Iterator[Policy]:
    """The kernels of another instruction set of this processor, and the policy of its class.

    Raises:
        ValueError: one that this processor or build does not have.
    """
    module = _extension.module
    assert module is not None
    before = module.isa()
    module.set_isa(isa)
    try:
        with use_policy(cpu_policy()) as policy:
            yield policy
    finally:
        module.set_isa(before)


for _policy in (_CUDA, cpu_policy()):
    _entered.append(_policy)
    _install(_policy)
