"""Every Triton kernel compiled ahead of time, without a GPU: no spills, 128-bit accesses.

The launchers run on CPU tensors with their kernels replaced by recorders; what they would launch is
compiled with the specialisation that a launch would get. Results are kept under .cache/ by a hash
of the sources. ``pytest -s`` prints registers, spills and the widths of loads and stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import fastfuse.ops.bilinear_triton as sampling  # noqa: E402
from fastfuse.ops.upsample_equalize_concat import triton as kernels  # noqa: E402

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "triton_offline"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = ("_forward_kernel", "_backward_kernel")
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

SIZE = (128, 128)
# A level of the target's size, and the ratios that give the backward 4, 8 and 16 taps.
RATIOS = (1, 2, 4, 8)
# Stores of the backward are 128 bits wide up to this ratio: beyond, a tile of source pixels is
# smaller than the threads are wide, and stores are a fraction 1 / ratio**2 of the loads.
WIDE_STORES = 2


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}

        return launch


def _compile(kernel: Any, arguments: dict[str, Any], arch: int) -> Any:
    """The kernel as a launch would specialise it: None and 1 are constants, 16 divides or not."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and specialise):
            signature[name] = "constexpr"
            constants[name] = value
            divisible = False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and specialise:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _inspect(cubin: bytes, folder: Path) -> dict[str, Any]:
    """Registers, bytes of local memory, and how many global accesses have which width."""
    file = folder / f"{hashlib.sha256(cubin).hexdigest()}.cubin"
    file.write_bytes(cubin)

    def dump(option: str) -> str:
        command = [str(CUOBJDUMP), option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", dump("--dump-resource-usage")))
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    local = 0
    for operation, modifiers in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)\s", dump("-sass")):
        if operation in ("LDL", "STL"):
            local += 1
            continue
        width = next((WIDTHS[m] for m in modifiers.split(".") if m in WIDTHS), 32)
        widths[operation][width] += 1
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "local": local,
        "shared": int(usage["SHARED"]),
        **{name: {str(w): n for w, n in sorted(counts.items())} for name, counts in widths.items()},
    }


def _launches(
    dtype: torch.dtype,
    channels_last: bool,
    channels: int,
    source: tuple[int, int],
    target: tuple[int, int] = SIZE,
    align_corners: bool = False,
) -> list[tuple[Any, dict[str, Any]]]:
    """What forward and backward launch for the second of two levels, of size ``source``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image(size: tuple[int, int]) -> torch.Tensor:
        return torch.empty((2, channels, *size), dtype=dtype, memory_format=memory_format)

    std = torch.ones(2)
    with pytest.MonkeyPatch.context() as patch:
        recorders = [Recorder(getattr(kernels, name)) for name in KERNELS]
        for name, recorder in zip(KERNELS, recorders, strict=True):
            patch.setattr(kernels, name, recorder)
        features = [image(target), image(source)]
        out = kernels.forward(features, *target, std, std, align_corners, channels_last)
        kernels.backward(
            out, [channels], [channels], source[:1], source[1:], std, align_corners, channels_last
        )
    return [(recorder.kernel, recorder.arguments) for recorder in recorders]


def _results(
    dtype: torch.dtype, channels_last: bool, arch: int, channels: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """By "kernel ratio": what the compiler made of it, from the cache if the sources are there."""
    sources = [Path(module.__file__).read_bytes() for module in (sampling, kernels)]
    case = f"{triton.__version__} {dtype} {channels_last} {arch} {channels}".encode()
    key = hashlib.sha256(b"\0".join([*sources, Path(__file__).read_bytes(), case])).hexdigest()
    cached = CACHE / f"{key}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    with ThreadPoolExecutor(1) as pool:  # looks into one kernel while the next compiles
        inspected: dict[bytes, Future[dict[str, Any]]] = {}
        names = {}
        for ratio in RATIOS:
            source = (SIZE[0] // ratio, SIZE[1] // ratio)
            for kernel, arguments in _launches(dtype, channels_last, channels, source):
                cubin = _compile(kernel, arguments, arch).asm["cubin"]
                names[f"{kernel.__name__.strip('_')} {ratio}"] = cubin
                if cubin not in inspected:
                    inspected[cubin] = pool.submit(_inspect, cubin, folder)
        results = {name: inspected[cubin].result() for name, cubin in names.items()}
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = CACHE / f"{key}.{os.getpid()}"
    scratch.write_text(json.dumps(results))
    scratch.replace(cached)
    return results


def _print_table(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'kernel, ratio':20} registers  stack  local  shared  loads, stores by bits")
    for name, row in results.items():
        print(
            f"{name:20} {row['registers']:9}  {row['stack']:5}  {row['local']:5}  "
            f"{row['shared']:6}  {row['LDG']} {row['STG']}"
        )


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
def test_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool, tmp_path: Path
) -> None:
    results = _results(dtype, channels_last, arch, 512, tmp_path)
    _print_table(f"sm_{arch} {dtype} channels_last={channels_last}", results)
    for name, row in results.items():
        assert row["stack"] == 0, f"{name} spills: {row}"
        assert row["local"] == 0, f"{name} spills: {row}"
        kernel, ratio = name.split()
        if not channels_last:
            continue
        # What is left are the scalars mean and std.
        assert row["LDG"].get("128", 0) > 0, f"{name}: {row}"
        assert set(row["LDG"]) <= {"128", "32"}, f"{name}: {row}"
        assert row["LDG"].get("32", 0) <= (2 if "forward" in name else 1), f"{name}: {row}"
        if kernel == "forward_kernel" or int(ratio) <= WIDE_STORES:
            assert set(row["STG"]) == {"128"}, f"{name}: {row}"


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float64, False), (torch.float16, True)],
    ids=["float64-contiguous", "float16-channels_last"],
)
def test_other_dtypes_do_not_spill(dtype: torch.dtype, channels_last: bool, tmp_path: Path) -> None:
    """Channels that no power of two divides well, whose accesses cannot be wide."""
    results = _results(dtype, channels_last, 90, 150, tmp_path)
    _print_table(f"sm_90 {dtype} channels_last={channels_last}, 150 channels", results)
    for name, row in results.items():
        assert row["stack"] == row["local"] == 0, f"{name} spills: {row}"


@pytest.mark.parametrize("align_corners", [False, True], ids=["half", "corners"])
@pytest.mark.parametrize(
    ("source", "target"),
    [((1, 1), (1, 1)), ((1, 1), (32, 32)), ((32, 32), (1, 1)), ((16, 1), (32, 7))],
    ids=["identity", "from one", "to one", "one column"],
)
def test_sizes_of_one_compile(
    source: tuple[int, int], target: tuple[int, int], align_corners: bool
) -> None:
    """A launch turns sizes of one into constants, which have no methods of a tensor."""
    for kernel, arguments in _launches(torch.float32, False, 1, source, target, align_corners):
        assert _compile(kernel, arguments, 90).asm["cubin"]
