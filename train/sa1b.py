"""SA-1B as it is downloaded: pairs of a photograph and a JSON file, in folders or tars.

Every JSON file is read when the data set is opened: name the tars that are needed, not all 1,000.
Source: Segment Anything (arXiv 2304.02643), the data set's README.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from samlight_jax.errors import InputError
from train.annotations import Dataset, Photo, Problem, fingerprint, make_instance
from train.photographs import Photographs


def open_sa1b(photographs: Photographs) -> Dataset:
    """All pairs `sa_1.jpg`, `sa_1.json`; a photograph or a JSON file alone is a problem.

    Raises:
      InputError: there is no pair.
    """
    problems: list[Problem] = []
    photos: list[Photo] = []
    seen: set[str] = set()
    parts: list[str | bytes] = []
    pictures = set()
    for name in photographs.names:
        json_name = str(PurePosixPath(name).with_suffix(".json"))
        pictures.add(json_name)
        try:
            data = _read_json(photographs, json_name)
            photos.append(_photo(name, _parse(data), seen, problems))
        except InputError as error:
            problems.append(Problem(f"photo {name}", str(error)))
            continue
        parts += [name, data]
    for name in photographs.entries:
        if name.endswith(".json") and name not in pictures:
            problems.append(Problem(name, "its photograph is missing"))
    if not photos:
        raise InputError(
            f"{photographs.source} holds no pair of a photograph and its JSON file; expected "
            "sa_1.jpg and sa_1.json side by side, as SA-1B is downloaded."
        )
    return Dataset(
        name=f"sa1b/{Path(photographs.source).name.removesuffix('.tar')}",
        kind="sa1b",
        photos=tuple(photos),
        categories={},
        problems=problems,
        fingerprint=fingerprint(parts),
        pixels=lambda name: photographs.read(name, upright=False),
    )


def _read_json(photographs: Photographs, name: str) -> bytes:
    if name not in photographs.entries:
        raise InputError(f"its annotations {name} are missing")
    return photographs.read_bytes(name)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"its annotations are no whole JSON file ({error})") from None
    image = content.get("image") if isinstance(content, dict) else None
    sides = [image.get(key) for key in ("height", "width")] if isinstance(image, dict) else []
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError("its annotations lack 'image' with height and width")
    if not isinstance(content.get("annotations"), list):
        raise InputError("its annotations lack the list 'annotations'")
    return content


def _photo(name: str, content: dict[str, Any], seen: set[str], problems: list[Problem]) -> Photo:
    image = content["image"]
    size = image["height"], image["width"]
    instances = []
    for annotation in content["annotations"]:
        key = annotation.get("id") if isinstance(annotation, dict) else None
        try:
            if key is None or str(key) in seen:
                raise InputError("it has no id" if key is None else "another one has this id")
            instances.append(
                make_instance(
                    id=key,
                    segmentation=annotation.get("segmentation"),
                    size=size,
                    bbox=annotation.get("bbox"),
                    area=annotation.get("area"),
                )
            )
            seen.add(str(key))
        except InputError as error:
            problems.append(Problem(f"annotation {key} of {name}", str(error)))
    return Photo(str(image.get("image_id", name)), name, size, tuple(instances))
