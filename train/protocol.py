"""`Protocol`: everything that decides an evaluation's numbers, as flags and as a sentence.

Published figures of the same weights differ by several points because their protocols do, so a
protocol is checked at birth, printed, and stored with every result.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

from samlight_jax.errors import InputError

PROMPTS = {
    "box": "the annotation's box",
    "box-jitter": "the annotation's box with noise on its corners",
    "point-center": "the mask's pixel nearest its centroid",
    "point-random": "a random pixel of the mask",
    "point-dt": "the mask's pixel farthest from its edge",
    "points-N": "N random pixels of the mask (points-3, say)",
    "detector": "the boxes of --detections",
    "teacher-grid": "a 4 x 4 grid of points that --agree-with answers first",
}
SELECTIONS = {
    "single": "the single-mask output",
    "pred-iou": "of three masks the one with the highest predicted IoU",
    "stability": "of three masks the most stable one (offset 1.0, full-size logits)",
    "box-iou": "of three masks the one whose tight box fits the prompt's best",
    "oracle": "of three masks the best by IoU with the truth (an upper bound)",
}
MAX_POINTS = 64

Metric = Literal["miou", "ap", "boundary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolFlags:
    """A protocol as flags give it, not checked.

    Attributes:
      prompt: box, box-jitter, point-center, point-random, point-dt, points-N, detector or
        teacher-grid.
      refine: corrective clicks after the prompt, each where the error is deepest; answered by the
        single-mask output with the last mask as input.
      mask_select: which of the model's masks counts.
      metric: one or several.
      crowd: score crowd annotations too.
      min_area: leave out instances of fewer pixels.
      seed: of random prompts; each instance has its own, whatever the order.
      image_size: side of the model's frame in pixels; None, the model's own.
      dtype: of the model's parameters and activations; masks and scores are float32.
      agree_with: a second model, by name or file: the agreement with its masks.
      detections: a COCO results JSON of boxes, for --prompt detector.
    """

    prompt: str = "box"
    refine: int = 0
    mask_select: Literal["single", "pred-iou", "stability", "box-iou", "oracle"] = "single"
    metric: tuple[Metric, ...] = ("miou",)
    crowd: bool = False
    min_area: float = 0.0
    seed: int = 0
    image_size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    agree_with: str | None = None
    detections: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(ProtocolFlags):
    """How masks are asked for, chosen and scored; the fields of `ProtocolFlags`, checked.

    Raises:
      InputError: a value is not allowed, or two do not go together.
    """

    def __post_init__(self):
        if self.prompt not in PROMPTS and self.points is None:
            raise InputError(
                f"--prompt {self.prompt}: expected {', '.join(PROMPTS)}, N from 1 to {MAX_POINTS}."
            )
        if self.mask_select not in SELECTIONS:
            raise InputError(f"--mask-select {self.mask_select}: expected {', '.join(SELECTIONS)}.")
        if not self.metric or set(self.metric) - {"miou", "ap", "boundary"}:
            raise InputError(f"--metric {' '.join(self.metric)}: expected miou, ap, boundary.")
        if not 0 <= self.refine <= MAX_POINTS:
            raise InputError(f"--refine {self.refine}: expected 0 to {MAX_POINTS} clicks.")
        if not (self.min_area >= 0):
            raise InputError(f"--min-area {self.min_area}: expected 0 or more pixels.")
        if self.prompt == "points-N":
            raise InputError("--prompt points-N: write the number, as in --prompt points-3.")
        self._check_detector()
        self._check_grid()
        if self.mask_select == "box-iou" and not self.has_box:
            raise InputError(
                f"--mask-select box-iou compares with the prompt's box, and --prompt {self.prompt} "
                "has none; take --prompt box, box-jitter or detector, or another selection."
            )

    def _check_detector(self) -> None:
        if (self.prompt == "detector") != (self.detections is not None):
            raise InputError(
                "--prompt detector and --detections FILE (a COCO results JSON of boxes) belong "
                f"together; got --prompt {self.prompt}, --detections {self.detections}."
            )
        if self.prompt != "detector":
            return
        if self.metric != ("ap",) or self.mask_select == "oracle" or self.refine:
            raise InputError(
                "A detector's box belongs to no annotation: --prompt detector takes --metric ap, "
                "and neither --refine nor --mask-select oracle."
            )

    def _check_grid(self) -> None:
        if self.prompt != "teacher-grid":
            return
        if self.agree_with is None:
            raise InputError("--prompt teacher-grid compares two models; add --agree-with TEACHER.")
        if self.refine or self.mask_select != "single" or self.metric != ("miou",):
            raise InputError(
                "--prompt teacher-grid has one rule of its own: leave --refine, --mask-select and "
                "--metric as they are."
            )

    @property
    def points(self) -> int | None:
        """N of points-N; 1 for the other point prompts; None without a point."""
        if self.prompt.startswith("point-"):
            return 1
        match = re.fullmatch(r"points-(\d+)", self.prompt)
        return int(match[1]) if match and 1 <= int(match[1]) <= MAX_POINTS else None

    @property
    def has_box(self) -> bool:
        """Whether every prompt is a box."""
        return self.prompt in ("box", "box-jitter", "detector")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def sentence(self) -> str:
        """What was done, for a report's first line."""
        kept = f"crowd annotations {'scored too' if self.crowd else 'left out'}"
        if self.min_area:
            kept += f"; instances under {self.min_area:g} pixels left out"
        if self.prompt == "teacher-grid":
            how = (
                "Agreement on unlabelled photographs: of a 4 x 4 grid of points the teacher's best "
                "masks by predicted IoU are prompts for both models, as a point (three masks, the "
                "highest predicted IoU) and as the mask's tight box (single mask); IoU on the "
                "low-resolution masks"
            )
        else:
            words = PROMPTS.get(self.prompt, f"{self.points} random pixels of the mask")
            how = f"Prompt: {words} ({self.prompt}); mask: {SELECTIONS[self.mask_select]}"
            if self.refine:
                how += f"; then {self.refine} corrective clicks with the single-mask output"
            how += f"; at the photograph's own resolution; {kept}"
        size = f"frame of {self.image_size} pixels, " if self.image_size else ""
        agree = f"; agreement with {self.agree_with}" if self.agree_with else ""
        return f"{how}{agree}; {size}{self.dtype}, seed {self.seed}."
