"""Cells that several tables share: means with their intervals, titles of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUT_OF_DOMAIN = ("davis",)  # sets without a sibling among the distillation photographs
AGREEMENT = {  # results of `train.evaluate --prompt teacher-grid`
    "agreement": "box",
    "agreement_point": "point",
    "agreement_token": "point, same token",
    "embedding_cosine": "cosine of embeddings",
}
Rows = Sequence[Sequence[str]]


def titled(name: str, masks: int) -> str:
    """A set's column: how many masks it has, and whether students see its like."""
    return f"{name} ({masks})" + (", out of domain" if name in OUT_OF_DOMAIN else "")


def mask(protocol: dict[str, Any]) -> str:
    """Which mask counts."""
    clicks = protocol["refine"]
    return protocol["mask_select"] + (f", {clicks} click{'s'[: clicks - 1]}" if clicks else "")


def mean(found: dict[str, float] | None) -> str:
    """A mean with half its interval's width."""
    return "-" if found is None else interval(found["value"], found["high"] - found["low"])


def together(found: Sequence[dict[str, float] | None]) -> str:
    """Of independent means: the widths of their intervals add as squares."""
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return "-"
    width = sum((each["high"] - each["low"]) ** 2 for each in known) ** 0.5
    return interval(sum(each["value"] for each in known) / len(known), width / len(known))


def change(found: dict[str, float]) -> str:
    """A signed difference with its interval."""
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def interval(value: float, width: float) -> str:
    """A mean with half the width."""
    return f"{value:.3f} ±{width / 2:.3f}"


def where(values: dict[str, Any]) -> str:
    """The device, the version and the day."""
    return f"{values['versions']['device']}, jax {values['versions']['jax']}, {values['date']}"
