"""Deployment runtimes as rivals: OpenVINO and ONNX Runtime, of a plain module, on the CPU.

``pip install 'fastfuse[runtimes]'``. Each compiles the module for fixed shapes, with as many
threads as PyTorch has, for latency; its layouts and fusions are its own, and its results go to
memory that it keeps. What is not installed, or has no kernels for a dtype, says so when called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.ops.policy import policy_of

__all__ = ["ONNXRUNTIME", "OPENVINO", "RUNTIMES", "Runtime"]

OPENVINO, ONNXRUNTIME = "OpenVINO", "ONNX Runtime"

Call = Callable[[], Tensor]


class _Inputs(nn.Module):
    """A module of several tensors, not of a list of them, as exporters want it."""

    def __init__(self, module: nn.Module, sequence: bool) -> None:
        super().__init__()
        self.module, self.sequence = module, sequence

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(inputs if self.sequence else inputs[0])


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'fastfuse[runtimes]'")


def _openvino(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    _require("openvino")
    if dtype != torch.float32 and dtype not in policy_of("cpu").native:
        raise RuntimeError(f"the processor has no instructions for {str(dtype)[6:]}")
    import openvino as ov

    # The traced graph: UPerHead takes the same time by way of ONNX.
    shapes = [ov.PartialShape(list(x.shape)) for x in inputs]
    graph = ov.convert_model(model, example_input=tuple(inputs), input=shapes)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    for i, x in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(x.numpy(), shared_memory=True))
    result = torch.from_numpy(request.get_output_tensor().data)

    def call() -> Tensor:
        request.infer(share_outputs=True)  # else it copies them
        return result

    return call


def _onnxruntime(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    _require("onnxruntime", "onnx", "onnxscript")
    if dtype != torch.float32:
        raise RuntimeError(f"ONNX Runtime's convolutions on CPUs have no {str(dtype)[6:]}")
    import onnxruntime as ort

    program = torch.onnx.export(model, tuple(inputs), dynamo=True, verbose=False)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    graph = program.model_proto.SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for declared, x in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_ortvalue_input(declared.name, ort.OrtValue.ortvalue_from_numpy(x.numpy()))
    output = torch.empty(session.get_outputs()[0].shape)
    name = session.get_outputs()[0].name
    binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(output.numpy()))
    result = torch.from_numpy(binding.get_outputs()[0].numpy())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return result

    return call


RUNTIMES = {OPENVINO: _openvino, ONNXRUNTIME: _onnxruntime}


class Runtime:
    """A module by a runtime, in the place of the module: exported and compiled at its first call.

    Args:
        module: in evaluation mode; its weights are converted to float32, which is what runtimes
            are given in every dtype.
        sequence: whether it takes a sequence of tensors, or one.
    """

    def __init__(self, name: str, module: nn.Module, sequence: bool) -> None:
        self.name, self.sequence = name, sequence
        self.module: nn.Module | None = module
        self.call: Call | None = None

    def __call__(self, inputs: Any) -> Tensor:
        """Of the tensors of the first call, ever again."""
        tensors = list(inputs) if self.sequence else [inputs]
        if self.call is None:
            assert self.module is not None
            model = _Inputs(self.module.float(), self.sequence).eval()
            as_float32 = [x.float().contiguous() for x in tensors]
            self.call = RUNTIMES[self.name](model, as_float32, tensors[0].dtype)
            self.module = None  # the runtime has weights of its own
        return self.call().to(tensors[0].dtype)
