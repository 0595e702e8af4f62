"""Host microseconds and launches of the Triton path, without a device.

    python benchmarks/host_time.py [--rounds N]

Triton's own dispatch and launcher run as on a GPU, over a libcuda whose launch only counts. Tensors
are tiny and on the CPU, so PyTorch's allocations and products are those of a CPU: what a call takes
here bounds how often a GPU could be given one, and is no time of a GPU. ``keys`` beside them are
compilations.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUB = r"""
#include <stdint.h>
#include <stddef.h>
static int dummy;
long long launches = 0;
#define ANSWER(name, ...) int name(__VA_ARGS__)
ANSWER(cuGetErrorString, int e, const char** s) { *s = "stub"; return 0; }
ANSWER(cuDeviceGet, int* d, int i) { *d = i; return 0; }
ANSWER(cuDeviceGetAttribute, int* v, int a, int d) { *v = 232448; return 0; }
ANSWER(cuCtxGetCurrent, void** c) { *c = &dummy; return 0; }
ANSWER(cuDevicePrimaryCtxRetain, void** c, int d) { *c = &dummy; return 0; }
ANSWER(cuDevicePrimaryCtxRetain_v2, void** c, int d) { *c = &dummy; return 0; }
ANSWER(cuCtxSetCurrent, void* c) { return 0; }
ANSWER(cuModuleLoadData, void** m, const void* d) { *m = &dummy; return 0; }
ANSWER(cuModuleGetFunction, void** f, void* m, const char* n) { *f = &dummy; return 0; }
ANSWER(cuFuncGetAttribute, int* v, int a, void* f) { *v = a == 0 ? 1024 : 0; return 0; }
ANSWER(cuFuncSetAttribute, void* f, int a, int v) { return 0; }
ANSWER(cuFuncSetCacheConfig, void* f, int c) { return 0; }
ANSWER(cuLaunchKernelEx, const void* c, void* f, void** p, void** e) { ++launches; return 0; }
ANSWER(cuOccupancyMaxActiveClusters, int* n, void* f, const void* c) { *n = 1; return 0; }
ANSWER(cuCtxGetLimit, size_t* v, int l) { *v = 0; return 0; }
ANSWER(cuCtxSetLimit, int l, size_t v) { return 0; }
ANSWER(cuPointerGetAttribute, void* d, int a, uint64_t p) { *(uint64_t*)d = p; return 0; }
ANSWER(cuTensorMapEncodeTiled, void) { return 0; }
ANSWER(cuTensorMapEncodeIm2col, void) { return 0; }
ANSWER(cuDriverGetVersion, int* v) { *v = 13000; return 0; }
"""


def stub_libcuda() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    source, library = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
    source.write_text(STUB, encoding="utf-8")
    options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, source, "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


_library = stub_libcuda()  # before triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402


class Driver(CudaDriver):
    """Of one H100 that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: (9, 0)
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
os.environ["FASTFUSE_EXTENSION"] = "none"  # whose kernels are the CPU's

_impl = torch.library.Library.impl


def _impl_of_gpus(self: Any, name: Any, function: Any, key: str = "", **options: Any) -> None:
    """What is a GPU's is the CPU's."""
    if key == "CUDA":
        _impl(self, name, function, "CPU", **options)
    elif key != "CPU":
        _impl(self, name, function, key, **options)


torch.library.Library.impl = _impl_of_gpus  # type: ignore[method-assign]

import fastfuse  # noqa: E402
from fastfuse import backends  # noqa: E402
from fastfuse.ops import define  # noqa: E402

backends._REFUSALS["triton"] = lambda tensor: None
define._STEPS["cpu"] = define._STEPS["triton"]
define._KERNELS["cpu"] = define._KERNELS["cuda"]
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment]

launches = ctypes.c_longlong.in_dll(_library, "launches")


def microseconds(call: Callable[[], Any], rounds: int = 200) -> tuple[float, int]:
    """The least processor time of a call, and its launches."""
    for _ in range(5):
        call()
    before = launches.value
    call()
    count = launches.value - before
    best = min(_timed(call) for _ in range(rounds))
    return best * 1e6, count


def _timed(call: Callable[[], Any], repeats: int = 5) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="the best of so many counts")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    levels = [image(1, 16, 8 >> i, 8 >> i) for i in range(4)]
    mean, std = torch.zeros(4), torch.ones(4)
    x = image(1, 16, 4, 4)
    shapes = [(16, 1, 7, 7), (16,), (16,), (16,), (64, 16), (64,), (16, 64), (16,), (16,)]
    block = [torch.randn(shape) for shape in shapes]
    weight = torch.randn(16, 64, 3, 3) / 20
    logits, target = image(1, 19, 4, 4), torch.randint(19, (1, 8, 8))
    calls: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "upsample_equalize_concat, 4 levels": (
            lambda *f: fastfuse.upsample_equalize_concat(f, mean=mean, std=std), levels,
        ),
        "upsample_add": (fastfuse.upsample_add, [levels[1], levels[0]]),
        "depthwise_conv2d": (fastfuse.depthwise_conv2d, [x, *block[:2]]),
        "ced_block": (fastfuse.ced_block, [image(1, 16, 12, 12), *block]),  # that recomputes
        "fusion_conv2d, 4 levels": (
            lambda w, *f: fastfuse.fusion_conv2d(f, w), [weight, *levels],
        ),
        "fusion_conv2d, equalized": (
            lambda w, *f: fastfuse.fusion_conv2d(f, w, mean=mean, std=std), [weight, *levels],
        ),
        "upsample_cross_entropy": (lambda x: fastfuse.upsample_cross_entropy(x, target), [logits]),
    }  # fmt: skip
    print(f"torch {torch.__version__}, triton {triton.__version__}; least host us, launches")
    print(f"torch.mm of 16 x 16 x 64 {microseconds(lambda: x.view(16, 16) @ block[4].T)[0]:.1f}")
    print(f"{'':36}{'forward':>16}{'with backward':>20}")
    for name, (op, inputs) in calls.items():
        with torch.no_grad():
            forward = microseconds(lambda op=op, inputs=inputs: op(*inputs), rounds)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        cotangent = torch.ones_like(op(*inputs))

        def step(op: Any = op, leaves: Any = leaves, cotangent: Any = cotangent) -> None:
            torch.autograd.grad(op(*leaves), leaves, cotangent)

        both = microseconds(step, max(rounds // 3, 1))
        row = f"{forward[0]:11.1f} {forward[1]:4}{both[0]:15.1f} {both[1]:4}"
        print(f"{name:36}{row}", flush=True)


if __name__ == "__main__":
    main()
