"""What :func:`fastfuse.convert` found in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ConversionReport", "Found"]


@dataclass(frozen=True)
class Found:
    """A module whose class is known.

    Attributes:
        name: in the model; "" is the model itself.
        target: its class, as patterns name it.
        reason: why it is left; None: it is converted.
    """

    name: str
    target: str
    reason: str | None


@dataclass(frozen=True)
class ConversionReport:
    """``print(report)`` is a table.

    Attributes:
        found: every module whose class is known.
        modules: how many modules the model has.
    """

    found: Sequence[Found]
    modules: int

    @property
    def converted(self) -> list[str]:
        """Names of the converted modules."""
        return [f.name for f in self.found if f.reason is None]

    @property
    def left(self) -> dict[str, str]:
        """Modules that are known and left, with the reason."""
        return {f.name: f.reason for f in self.found if f.reason is not None}

    def __str__(self) -> str:
        count = len(self.converted)
        plural = "" if count == 1 else "s"
        lines = [f"{count} module{plural} of {self.modules} converted"]
        if not self.found:
            lines[0] = f"none of {self.modules} modules is known: nothing was changed"
        groups: dict[tuple[str, str | None], list[str]] = {}
        for f in self.found:
            groups.setdefault((f.target, f.reason), []).append(f.name or "(the model)")
        for (target, reason), names in groups.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            what = "converted" if reason is None else "left"
            lines.append(f"  {what:9}  {target}  {shown}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)
