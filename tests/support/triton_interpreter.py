"""Triton kernels on the CPU: tests that run in a child process with Triton's interpreter.

The interpreter is chosen when triton is imported and would then replace the compiler everywhere, so
the main test process never turns it on. Tests marked by :func:`interpreted` run in a child, all of
a file in one; in the main process each reports what became of it there. ``-m`` and ``-k`` select
tests of the child too.
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

ROOT = Path(__file__).resolve().parents[2]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SELECTION: list[str] = []  # pytest's options that select tests, as conftest.py finds them

requires_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test under Triton's interpreter."""
    if INTERPRETING:
        return test

    @functools.wraps(test)
    def report(*args: Any, **kwargs: Any) -> None:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::", 1)[1].rsplit(" (", 1)[0]
        outcomes, output = _run_interpreted(test.__code__.co_filename)
        failure = outcomes.get(name, f"did not run under the interpreter:\n{output}")
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    return requires_triton(report)


@functools.cache
def _run_interpreted(path: str) -> tuple[dict[str, str | None], str]:
    """What failed in each test of a file, None where nothing did, and everything printed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        pytest_options = ["-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *pytest_options, *SELECTION, path],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        outcomes: dict[str, str | None] = {}
        if results.exists():
            for case in ElementTree.parse(results).iter("testcase"):
                problems = [e for e in case if e.tag in ("failure", "error", "skipped")]
                outcomes[case.attrib["name"]] = problems[0].text or "" if problems else None
    return outcomes, child.stdout


# bfloat16. The interpreter holds it as uint16 and computes with these integers, and it truncates
# where hardware rounds to nearest even. The patch widens to float32, computes, and rounds back.


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


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
        return TensorHandle(_widen(handle.data), tl.float32)

    def patched_cast(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        src = widen(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(_round(src.data.astype(np.float32)), tl.bfloat16)
        return src if dst_type.scalar == tl.float32 else cast(self, src, dst_type)

    def patched_binary_op(
        self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary_op(self, lhs, rhs, op)
        result = op(_widen(lhs.data), _widen(rhs.data))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_round(result), tl.bfloat16)

    def patched_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any
    ) -> TensorHandle:
        return dot(self, widen(a), widen(b), *args)

    InterpreterBuilder.cast_impl = patched_cast
    InterpreterBuilder.binary_op = patched_binary_op
    InterpreterBuilder.create_dot = patched_dot


# fma. The interpreter of triton before 3.9 rounds its product too; compiled code has `fma.rn`.


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a + b``, and what its rounding lost (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a * b``, and what its rounding lost (Dekker)."""
    half = a.dtype.type(2 ** (np.finfo(a.dtype).nmant // 2 + 1) + 1)
    high_a, high_b = (half * x - (half * x - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    product = a * b
    return product, low_a * low_b - (
        ((product - high_a * high_b) - low_a * high_b) - high_a * low_b
    )


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of finite numbers, rounded once (Boldo and Melquiond, 2008)."""
    product, product_rest = _two_product(x, y)
    addend, addend_rest = _two_sum(z, product_rest)
    total, total_rest = _two_sum(product, addend)
    rest, lost = _two_sum(addend_rest, total_rest)
    # Rounded to odd, the rest remembers on which side of a tie it was.
    even = rest.view(f"i{rest.itemsize}") % 2 == 0
    towards = np.copysign(rest.dtype.type(np.inf), lost)
    return total + np.where(even & (lost != 0), np.nextafter(rest, towards), rest)


def patch_fma() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def patched(
        self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
    ) -> TensorHandle:
        return TensorHandle(fma(*np.broadcast_arrays(x.data, y.data, z.data)), x.dtype.scalar)

    InterpreterBuilder.create_fma = patched


if INTERPRETING:
    patch_bfloat16()
    patch_fma()
