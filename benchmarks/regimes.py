"""How large results get their memory on the CPU: one regime for every variant of a run."""

from __future__ import annotations

import os

__all__ = ["REGIMES", "current_regime"]

REGIMES: dict[str, dict[str, str]] = {
    "fresh": {},  # as installed: fresh pages; fastfuse asks for huge ones
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},  # PyTorch asks for huge pages for everyone
    "warm": {  # the allocator keeps what it once had
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(1 << 30),
    },
}


def current_regime() -> str:
    """The regime this process was started in, from its environment."""
    names = {name for variables in REGIMES.values() for name in variables}
    found = {name: os.environ[name] for name in names if name in os.environ}
    return next((regime for regime, variables in REGIMES.items() if variables == found), "custom")
