"""``python -m fastfuse``, and that verify finds what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse import backends, cli, verify
from fastfuse.backends import requested_backend
from fastfuse.ops import OPERATIONS
from fastfuse.ops.define import Sample


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "upsample_equalize_concat on cpu: cpu" in capsys.readouterr().out


def test_info_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--shape", "1x512x128x128", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "what runs on 1x512x128x128, bfloat16, channels_last" in printed
    assert "upsample_equalize_concat" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "512x128"], "expected NxCxHxW, each at least 1, such as 1x512x128x128; got"),
        (["--shape", "9999999x9999999x9999999x9"], "shape must have fewer than 2^63 bytes"),
        (["--dtype", "bfloat16"], "--dtype and --layout go with --shape"),
    ],
)
def test_info_of_what_no_op_takes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["info", *arguments])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_verify_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--op", "upsample_add"]) == 0
    output = capsys.readouterr().out
    assert "0 failed" in output
    assert "skipped" in output
    assert "expected CUDA tensors" in " ".join(output.split()) or torch.cuda.is_available()


@pytest.mark.parametrize("op", OPERATIONS)
def test_references_equal_their_definitions(op: str) -> None:
    """Kernels: test_equals_the_definition of every op."""
    statuses = {check.status for check in verify.verify(ops=[op], backends=["reference"])}
    assert "passed" in statuses
    assert statuses <= {"passed", "coarse"}


def test_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--self-test", "--op", "upsample_add"]) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_planted_fault_is_caught(op: str) -> None:
    checks = list(verify.self_test(ops=[op], backends=["cpu"]))
    assert checks
    assert {check.status for check in checks} == {"passed"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--self-test"]], ids=["verify", "self-test"])
def test_everything_passes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == 0
    assert "0 failed" in capsys.readouterr().out


def test_verify_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is wrong in one value of a hundred thousand makes the exit code 1."""
    call = OPERATIONS["upsample_equalize_concat"].op["cpu"]
    original = call.target

    def wrong(*args: object) -> torch.Tensor:
        output = original(*args)
        with torch.no_grad():
            output[-1, -1, -1, -1] += 0.1
        return output

    monkeypatch.setattr(call, "target", wrong)
    only = ["--op", "upsample_equalize_concat", "--backend", "cpu", "--dtype", "float32"]
    assert cli.main(["verify", *only]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "0 passed, 2 failed" in output
    assert "relative error" in output


class Identity:
    """As much of an op as verify sees."""

    name, backends, takes_size = "identity", ("cpu",), False
    differentiable = twice_differentiable = True

    def __init__(self, samples: Any) -> None:
        self.samples = samples


def off_by(factor: float, backends: tuple[str, ...], *dtypes: torch.dtype) -> Any:
    """The identity, off by a factor on some backends in some dtypes."""

    def call(x: Tensor) -> Tensor:
        off = requested_backend() in backends and x.dtype in dtypes
        return x * factor if off else x.clone()

    def samples(*, dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
        x = torch.randn(2, 3, 4, 4, dtype=dtype)
        yield Sample("identity", (x,), call, lambda x: x.clone(), channels_last=False)

    return Identity(samples)


HALF = (torch.bfloat16, torch.float16)


def test_pytorchs_own_coarseness_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference in bfloat16 and float16 is named, with its error; verify goes on."""
    monkeypatch.setitem(OPERATIONS, "identity", off_by(1.1, ("reference",), *HALF))
    assert cli.main(["verify", "--op", "identity"]) == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "12 passed, 0 failed, 4 coarse" in output
    assert "relative error 1.0" in output
    checks = list(verify.self_test(ops=["identity"], backends=["reference"]))
    assert [check.dtype for check in checks if check.status == "coarse"] == [
        "bfloat16", "bfloat16", "float16", "float16"
    ]  # fmt: skip
    assert all(check.status in ("coarse", "passed") for check in checks)


@pytest.mark.parametrize(
    ("factor", "backends", "dtype"),
    [
        (1.1, ("cpu",), torch.bfloat16),
        (1.1, ("cpu",), torch.float16),
        (1.1, ("cpu",), torch.float32),
        (1 + 1e-5, ("reference",), torch.float32),
        (1 + 1e-12, ("reference",), torch.float64),
        (math.nan, ("reference",), torch.bfloat16),
    ],
)
def test_everything_else_off_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, factor: float, backends: tuple[str, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setitem(OPERATIONS, "identity", off_by(factor, backends, dtype))
    statuses = {(c.backend, c.dtype): c.status for c in verify.verify(ops=["identity"])}
    failed = (*backends, str(dtype).removeprefix("torch."))
    assert [where for where, status in statuses.items() if status != "passed"] == [failed]
    assert statuses[failed] == "failed"


def test_a_dtype_that_a_backend_refuses_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA C++ refuses float64."""

    def refusal(tensor: torch.Tensor) -> str | None:
        return "expected another dtype" if tensor.dtype == torch.float64 else None

    monkeypatch.setitem(backends._REFUSALS, "cpu", refusal)
    dtypes = [torch.float64, torch.float32]
    found = list(verify.verify(ops=["upsample_add"], backends=["cpu"], dtypes=dtypes))
    statuses = [(check.dtype, check.status) for check in found]
    assert statuses == [("float64", "skipped"), *[("float32", "passed")] * 2]


def test_nothing_to_run_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("triton can run here")
    assert cli.main(["verify", "--backend", "triton"]) == 1
    assert "nothing could run" in capsys.readouterr().out


def test_self_test_fails_if_a_fault_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = verify.Fault("no fault at all", lambda x, tol: x)
    monkeypatch.setattr(verify, "FAULTS", (harmless,))
    checks = list(verify.self_test(backends=["cpu"], dtypes=[torch.float32]))
    assert checks
    assert all(check.status == "failed" for check in checks)
    assert "no fault at all in output was not caught" in checks[0].detail


def test_every_operation_has_samples() -> None:
    for operation in OPERATIONS.values():
        arguments = {"device": "cpu", "dtype": torch.float32, "channels_last": False}
        assert next(operation.samples(**arguments, small=True)).inputs
        assert next(operation.samples(**arguments)).inputs


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["verify", "--op", "nonsense"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
