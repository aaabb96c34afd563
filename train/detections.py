"""Boxes of a detector, from a COCO results JSON, as prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from samlight_jax.errors import InputError
from train.annotations import Dataset, Problem


class Detection(NamedTuple):
    """One box; `id` is its place in the file."""

    id: str
    box: tuple[float, float, float, float]
    category: int
    score: float


class Detections(NamedTuple):
    """The boxes by photograph, what was left out of them, and the file's SHA-256."""

    by_photo: dict[str, tuple[Detection, ...]]
    problems: list[Problem]
    fingerprint: str


def read_detections(path: Path, dataset: Dataset) -> Detections:
    """Reads [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...].

    An entry of an unknown photograph or category, or without a box that covers anything, is a
    problem and left out.

    Raises:
      InputError: no such file, no such list, or no entry of it can be used.
    """
    try:
        content = path.read_bytes()
        entries = json.loads(content)
    except OSError as error:
        raise InputError(f"--detections {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InputError(f"--detections {path} is not whole JSON ({error}).") from None
    if not isinstance(entries, list):
        raise InputError(
            f"--detections {path} holds a {type(entries).__name__}; expected a list of COCO "
            'results, [{"image_id": ..., "category_id": ..., "bbox": [x, y, w, h], "score": ...}].'
        )
    photos = {photo.id for photo in dataset.photos}
    by_photo: dict[str, list[Detection]] = defaultdict(list)
    problems = []
    for place, entry in enumerate(entries):
        found = _detection(place, entry, photos, dataset.categories)
        if isinstance(found, str):
            problems.append(Problem(f"detection {place}", found))
        else:
            by_photo[str(entry["image_id"])].append(found)
    if not by_photo:
        why = problems[0].why if problems else "the list is empty"
        raise InputError(
            f"No detection of {path} can be used for this data: {why.rstrip('.')}; expected "
            "image_id and category_id of the annotations."
        )
    whole = {photo: tuple(each) for photo, each in by_photo.items()}
    return Detections(whole, problems, hashlib.sha256(content).hexdigest())


def _detection(
    place: int, entry: Any, photos: set[str], categories: dict[int, str]
) -> Detection | str:
    """The detection, or a sentence that says why there is none."""
    try:
        x, y, width, height = (float(side) for side in entry["bbox"])
        image, category, score = str(entry["image_id"]), entry["category_id"], entry["score"]
        numbers = (x, y, width, height, score := float(score))
    except (KeyError, TypeError, ValueError) as error:
        return f"It lacks image_id, category_id, bbox or score ({type(error).__name__}: {error})."
    if image not in photos:
        return f"Its image_id {image} is not in the data."
    if category not in categories:
        return f"Its category_id {category} is not in the data."
    if not all(map(math.isfinite, numbers)) or width <= 0 or height <= 0:
        return f"Its box {entry['bbox']} (score {score}) covers nothing or is not finite."
    return Detection(f"detection-{place}", (x, y, x + width, y + height), int(category), score)
