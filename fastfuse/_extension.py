"""Loads the compiled module ``fastfuse._C``, or keeps the exact reason why it cannot be loaded.

Loading it registers the CPU kernels with PyTorch's dispatcher. fastfuse works without it, on the
reference backend; ``fastfuse.info()`` shows ``failure``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the module that links to them)

__all__ = ["failure", "module"]


def _load() -> tuple[ModuleType | None, str | None]:
    path = os.environ.get("FASTFUSE_EXTENSION")
    try:
        if path:  # another build of the same module, such as the sanitizer's
            spec = importlib.util.spec_from_file_location("fastfuse._C", path)
            if spec is None or spec.loader is None:
                raise ImportError(f"FASTFUSE_EXTENSION: not an extension module: {path}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module("fastfuse._C")
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}{_advice(error)}"
    loaded.isa()  # a FASTFUSE_ISA that cannot run here must not pass unnoticed
    return loaded, None


def _advice(error: ImportError) -> str:
    """Where the source tree is imported, which hides what was installed from it."""
    root = Path(__file__).resolve().parent.parent
    if not isinstance(error, ModuleNotFoundError) or not (root / "csrc").is_dir():
        return ""
    return f" (imported from the source tree {root}: leave it, or install with pip's --editable)"


module: ModuleType | None
failure: str | None
module, failure = _load()
