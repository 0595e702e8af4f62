"""Reports as JSON that is short, and whose lines are what changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["compact", "lines", "load"]

DIGITS = 4  # of the numbers in report.json
VARIANT_DEFAULTS: dict[str, Any] = {
    "layout": "", "rival": True, "differs": "", "wrong": "", "gbs": None, "share": None,
    "gflops": None, "peak_bytes": None, "kept_bytes": None,
}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """A report's JSON, with what ``compact`` leaves out."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for cell in report["cells"]:
        for variant in cell["variants"]:
            for key, value in VARIANT_DEFAULTS.items():
                variant.setdefault(key, value)
            layout = f", {variant['layout']}" if variant["layout"] else ""
            variant["title"] = variant["name"] + layout
    return report


def compact(report: dict[str, Any]) -> str:
    """JSON with a line for the environment, for every cell and for every variant, and with floats
    of DIGITS digits. What a variant has in common with most is left out.
    """
    cells = []
    for cell in report["cells"]:
        variants = [
            {
                key: value
                for key, value in variant.items()
                if key not in ("title", "min_ms") and value != VARIANT_DEFAULTS.get(key, ...)
            }
            for variant in cell["variants"]
        ]
        cells.append(cell | {"variants": variants})
    return lines(report | {"cells": cells}) + "\n"


def lines(value: Any) -> str:
    """JSON with a line for each object of a list, and for what an object holds besides lists."""

    def is_table(item: Any) -> bool:
        return isinstance(item, list) and bool(item) and isinstance(item[0], dict)

    if is_table(value):
        return "[\n" + ",\n".join(lines(item) for item in value) + "]"
    if isinstance(value, dict) and any(is_table(item) for item in value.values()):
        plain = {key: item for key, item in value.items() if not is_table(item)}
        parts = [_dumps(plain)[1:-1]] if plain else []
        parts += [f'"{key}": {lines(item)}' for key, item in value.items() if is_table(item)]
        return "{" + ", ".join(parts) + "}"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
