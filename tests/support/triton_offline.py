"""Triton kernels compiled ahead of time, without a GPU.

Launchers run on CPU tensors with their kernels replaced by recorders; what they would launch is
compiled with the specialisation that a launch would get. What the compiler made of it is kept under
.cache/ by a hash of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastfuse.ops import launch_triton

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "triton_offline"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")

Launch = tuple[Any, dict[str, Any]]  # a kernel and the arguments it is launched with


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` launches, in order; nothing is run."""
    return [launch for launch, _ in recorded_programs(call)]


def recorded_programs(call: Callable[[], Any]) -> list[tuple[Launch, int]]:
    """``recorded``, and how many programs each launch has."""
    launches: list[tuple[Launch, int]] = []

    def record(self: launch_triton.Launch, *tensors: Any) -> None:
        values = (*tensors, *self.integers)
        arguments = {**dict(zip(self.kernel.arg_names, values, strict=False)), **self.constants}
        launches.append(((self.kernel, arguments), self.programs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_triton.Launch, "__call__", record)
        call()
    return launches


def specialised(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[ASTSource, list[tuple[str, Any]], dict[str, Any]]:
    """A kernel's source, the arguments that remain with their types, and a launch's options.

    As a launch would have them: None and 1 are constants, 16 divides or not.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    remaining: list[tuple[str, Any]] = []

    def specialise(path: tuple[int, ...], value: Any, parameter: Any) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return tuple(specialise((*path, i), v, parameter) for i, v in enumerate(value))
        free = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            kind, divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and free):
            constants[path] = value
            return "constexpr"
        else:
            kind, divisible = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if divisible and free:
            attributes[path] = [["tt.divisibility", 16]]
        remaining.append((kind, value))
        return kind

    signature = {
        parameter.name: specialise((i,), arguments[parameter.name], parameter)
        for i, parameter in enumerate(kernel.params)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}
    return source, remaining, options


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles anew for."""
    source, _, options = specialised(*launch)
    parts = (source.signature, source.constants, source.attrs, options)
    return (launch[0], *(repr(sorted(part.items(), key=str)) for part in parts))


def compiled(kernel: Any, arguments: dict[str, Any], arch: int) -> Any:
    """The kernel as a launch would specialise it."""
    source, _, options = specialised(kernel, arguments)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(assembly: dict[str, Any]) -> dict[str, Any]:
    """Registers, bytes of local memory, and how many global accesses have which width.

    What is spilled is on the stack, what passes from thread to thread is stored to shared memory.
    Widths are those of PTX, which the assembler keeps.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", dump))
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for operation, values, bits in ACCESS.findall(assembly["ptx"]):
        widths[operation][int(values or 1) * int(bits)] += 1
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": int(usage["SHARED"]),
        "passed": assembly["ptx"].count("st.shared"),
        **{name: {str(w): n for w, n in sorted(counts.items())} for name, counts in widths.items()},
    }


def inspected(
    module: ModuleType, case: str, arch: int, launches: Callable[[], Iterable[tuple[str, Launch]]]
) -> dict[str, dict[str, Any]]:
    """By name: what the compiler made of a launch, from the cache if the sources are there.

    ``launches`` gives names and launches of the module's kernels; ``case`` is its name in the
    cache, where it stays as long as the kernels and the file that defines ``launches`` do.
    """
    files = (
        *sorted(map(str, Path(launch_triton.__file__).parent.glob("*_triton.py"))),
        *sorted(map(str, Path(str(module.__file__)).parent.glob("*triton.py"))),
        __file__,
        launches.__code__.co_filename,
    )
    sources = [Path(str(file)).read_bytes() for file in files]
    case = f"{triton.__version__} {arch} {case}"
    key = hashlib.sha256(b"\0".join([*sources, case.encode()])).hexdigest()
    return kept(
        CACHE / f"{key}.json",
        lambda: {
            name: inspect(compiled(kernel, arguments, arch).asm)
            for name, (kernel, arguments) in launches()
        },
    )


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What the JSON file has; if there is none, what ``make`` gives, which it has from then on."""
    if file.exists():
        return json.loads(file.read_text())
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(made))
    scratch.replace(file)
    return made


def print_table(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'kernel':24} registers  stack  shared  loads, stores by bits")
    for name, row in results.items():
        print(
            f"{name:24} {row['registers']:9}  {row['stack']:5}  {row['shared']:6}  "
            f"{row['ld']} {row['st']}"
        )
