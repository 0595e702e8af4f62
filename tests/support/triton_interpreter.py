"""Triton kernels on CPU tensors: in Triton's interpreter, as compiled PTX, or on a device.

The interpreter is chosen when triton is imported and would then replace the compiler everywhere, so
the main test process never turns it on. Tests marked by :func:`interpreted` run in a child, all of
a file in one; in the main process each reports what became of it there. ``-m`` and ``-k`` select
tests of the child too.

With TRITON_TESTS_ON=sm_90 in the environment (sm_80, any other) they run in this process: kernels
are compiled for that GPU and the PTX is run on the CPU (``ptx.launch``). With
TRITON_TESTS_ON=device they run on a CUDA device, to which tensors are copied (``triton_device``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rounding import fma, round_bfloat16, widen_bfloat16
from workers import made_once

ROOT = Path(__file__).resolve().parents[2]
TESTS_ON = os.environ.get("TRITON_TESTS_ON", "")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" or TESTS_ON != ""
SELECTION: list[str] = []  # pytest's options that select tests, as conftest.py finds them

Outcomes = dict[str, str | None]  # by "file::test": what failed, None where nothing did

requires_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where kernels take CPU tensors: if not here, under Triton's interpreter."""
    if INTERPRETING:
        return test

    @functools.wraps(test)
    def report(*args: Any, **kwargs: Any) -> None:
        path, _, name = os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0].partition("::")
        outcomes, output = _run_interpreted(test.__code__.co_filename)
        failure = outcomes.get(
            f"{Path(path).name}::{name}", f"did not run under the interpreter:\n{output}"
        )
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    return requires_triton(report)


@functools.cache
def _run_interpreted(path: str) -> tuple[Outcomes, str]:
    arguments = (*SELECTION, path)
    outcomes, output = made_once(
        f"interpreted {arguments}", lambda: run_child({"TRITON_INTERPRET": "1"}, *arguments)
    )
    return outcomes, output


def run_child(environment: dict[str, str], *arguments: str) -> tuple[Outcomes, str]:
    """What became of the tests of a pytest of these arguments, and everything printed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        pytest_options = ["-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *pytest_options, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        outcomes: Outcomes = {}
        if results.exists():
            for case in ElementTree.parse(results).iter("testcase"):
                problems = [e for e in case if e.tag in ("failure", "error", "skipped")]
                name = f"{case.attrib['classname'].split('.')[-1]}.py::{case.attrib['name']}"
                outcomes[name] = problems[0].text or "" if problems else None
    return outcomes, child.stdout


# bfloat16. The interpreter holds it as uint16 and computes with these integers, and it truncates
# where hardware rounds to nearest even. The patch widens to float32, computes, and rounds back.


def patch_bfloat16() -> None:
    """Corrects bfloat16 casts, binary operators and dot of the interpreter (triton 3.6 to 3.9)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, binary_op, dot = (
        getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "create_dot")
    )

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(widen_bfloat16(handle.data), tl.float32)

    def patched_cast(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        src = widen(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return src if dst_type.scalar == tl.float32 else cast(self, src, dst_type)

    def patched_binary_op(
        self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary_op(self, lhs, rhs, op)
        result = op(widen_bfloat16(lhs.data), widen_bfloat16(rhs.data))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(round_bfloat16(result), tl.bfloat16)

    def patched_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any
    ) -> TensorHandle:
        return dot(self, widen(a), widen(b), *args)

    InterpreterBuilder.cast_impl = patched_cast
    InterpreterBuilder.binary_op = patched_binary_op
    InterpreterBuilder.create_dot = patched_dot


# fma. The interpreter of triton before 3.9 rounds its product too; compiled code has `fma.rn`.


def patch_fma() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def patched(
        self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
    ) -> TensorHandle:
        return TensorHandle(fma(*np.broadcast_arrays(x.data, y.data, z.data)), x.dtype.scalar)

    InterpreterBuilder.create_fma = patched


# splat. That of triton 3.9 makes a comparison of scalars, a bool, an int32, which no mask may be.


def patch_splat() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def patched(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        (scalar,) = [a for a in arguments if isinstance(a, TensorHandle)]
        result = splat(self, *arguments)
        if scalar.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    InterpreterBuilder.create_splat = patched


# Time. Every launch, and every call of a device function, would go through all of triton.language;
# every operation would build a table of dtypes, and every sum of indices would be checked in int64,
# which on these shapes cannot fail and no compiled kernel does.


def patch_time() -> None:
    """Takes half of an interpreted kernel's time away; its values stay."""
    from triton.runtime import interpreter

    patch_language, patched = interpreter._patch_lang, set[int]()
    numpy_dtype, found = interpreter._get_np_dtype, dict[str, Any]()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch_language(function)  # for good: nothing is compiled in this process
        return interpreter._LangPatchScope()

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = numpy_dtype(dtype)
        return found[name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = find_once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


if TESTS_ON == "device":
    import triton_device

    triton_device.install()
elif TESTS_ON:
    from ptx.launch import Launcher

    Launcher(int(TESTS_ON.removeprefix("sm_"))).__enter__()
elif INTERPRETING:
    patch_bfloat16()
    patch_fma()
    patch_splat()
    patch_time()
