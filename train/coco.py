"""COCO and LVIS: their JSON files and how their folders usually lie.

`neg_category_ids` and other marks of LVIS's federated protocol are not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from samlight_jax.errors import InputError
from train.annotations import (
    Dataset,
    Instance,
    Kind,
    Photo,
    Problem,
    fingerprint,
    make_instance,
)
from train.photographs import Root, open_photographs

PREFIX = {"coco": "instances_", "lvis": "lvis_v1_"}
LVIS_SPLITS = ("train2017", "val2017", "test2017")  # its photographs are COCO's, by COCO's split


class Source(Protocol):
    """Where photographs come from: `train.photographs.Photographs`, or records of tfds."""

    def find(self, wanted: str) -> str | None:
        """The name here of the photograph that annotations call `wanted`, or None."""
        ...

    def read(self, name: str, *, upright: bool) -> np.ndarray:
        """(height, width, 3) uint8 RGB."""
        ...


def open_layout(kind: Literal["coco", "lvis"], root: Path, split: str | None) -> Dataset:
    """A folder with annotations and photographs.

    One of: `annotations.json` and `images/`; `annotations/instances_<split>.json` and `<split>/`
    (COCO); `lvis_v1_<split>.json`, there or in `annotations/`, and `train2017/`, `val2017/` (LVIS).
    The photographs may lie under `images/`, and each folder of them may be a tar of its name.

    Raises:
      InputError: nothing is found, or several splits and none is named.
    """
    if not root.is_dir():
        raise InputError(f"There is no folder {root}; expected the root of {kind}'s data.")
    if split is None and (root / "annotations.json").exists():
        path, name = root / "annotations.json", root.resolve().name
    else:
        path = _find_json(kind, root, split)
        name = f"{kind}/{path.stem.removeprefix(PREFIX[kind])}"
    return load(path, open_photographs(_places(root, path)), kind=kind, name=name)


def open_json(path: Path, root: Root | None) -> Dataset:
    """A JSON file in COCO's format, and its photographs, under `root` or else beside the file."""
    if not path.is_file():
        raise InputError(f"There is no file {path}; expected annotations in COCO's format.")
    folder = path.parent.parent if path.parent.name == "annotations" else path.parent
    places = _places(folder, path) if root is None else root
    name = path.resolve().parent.name if path.stem == "annotations" else path.stem
    return load(path, open_photographs(places), kind="coco", name=name)


def _find_json(kind: str, root: Path, split: str | None) -> Path:
    folders = (root / "annotations", root)
    pattern = f"{PREFIX[kind]}*.json"
    found = {
        path.stem.removeprefix(PREFIX[kind]): path for f in folders for path in f.glob(pattern)
    }
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split in found:
        return found[split]
    got = f"split={split!r}: {root} holds " + (", ".join(sorted(found)) or "no split")
    raise InputError(
        f"{got}; expected annotations/{PREFIX[kind]}<split>.json"
        + (": name one of them." if found else ", or annotations.json and no split.")
    )


def _places(root: Path, path: Path) -> list[Path]:
    """The folders and tars below `root` that may hold the photographs of a JSON file."""
    split = path.stem.split("_")[-1]
    for names in (
        (split,),
        LVIS_SPLITS if path.stem.startswith(PREFIX["lvis"]) else (),
        ("images",),
    ):
        places = []
        for name in names:
            candidates = [
                base / each for base in (root, root / "images") for each in (name, f"{name}.tar")
            ]
            places += [place for place in candidates if place.exists()][:1]
        if places:
            return places
    return [root]


def load(path: Path, source: Source, *, kind: Kind, name: str) -> Dataset:
    """Reads a JSON file in COCO's format; `source` has the photographs.

    Raises:
      InputError: no such JSON, or no photograph of it is there.
    """
    data = path.read_bytes()
    content = _parse(data, path)
    categories = {
        each["id"]: str(each.get("name", each["id"]))
        for each in content.get("categories", [])
        if isinstance(each, dict) and isinstance(each.get("id"), int)
    }
    reader = _Reader(source, categories)
    for image in content["images"]:
        reader.add_photo(image)
    if not reader.photos:
        problems = "; ".join(f"{p.what}: {p.why}" for p in reader.problems[:1])
        raise InputError(
            f"Nothing is left of {path}: of its {len(content['images'])} photographs none is found "
            f"({problems or 'it names none'}); expected a root that holds them."
        )
    for annotation in content["annotations"]:
        reader.add_annotation(annotation)
    photos = reader.result()
    return Dataset(
        name=name,
        kind=kind,
        photos=photos,
        categories=categories,
        problems=reader.problems,
        fingerprint=fingerprint([data, *(photo.name for photo in photos)]),
        pixels=lambda photo: source.read(reader.files[photo], upright=False),
    )


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise InputError(
            f"{path} is no whole JSON file ({error}); copy or download it again."
        ) from None
    lists = ("images", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in lists):
        raise InputError(
            f"{path} is not in COCO's format: expected an object with the lists 'images' and "
            "'annotations'."
        )
    return content


class _Reader:
    """Photographs and annotations, one by one; the wrong ones become problems."""

    def __init__(self, source: Source, categories: Mapping[int, str]):
        self.source = source
        self.categories = categories
        self.photos: dict[Any, Photo] = {}  # by the JSON's id
        self.instances: dict[Any, list[Instance]] = {}
        self.files: dict[str, str] = {}  # a photo's name -> the source's
        self.missing: set[Any] = set()  # ids of photographs that are problems already
        self.seen: set[str] = set()
        self.problems: list[Problem] = []

    def add_photo(self, image: Any) -> None:
        what = f"photo {_photo_name(image)}"
        try:
            photo, file = self._photo(image)
        except InputError as error:
            self.problems.append(Problem(what, str(error)))
            if isinstance(image, dict) and isinstance(image.get("id"), (int, str)):
                self.missing.add(image["id"])
            return
        self.photos[image["id"]] = photo
        self.instances[image["id"]] = []
        self.files[photo.name] = file

    def _photo(self, image: Any) -> tuple[Photo, str]:
        name = _photo_name(image)
        if name is None or not isinstance(image.get("id"), (int, str)):
            raise InputError(f"it needs an id and a file_name (or coco_url); got {image!r:.200}")
        if image["id"] in self.photos:
            raise InputError(f"its id {image['id']} is that of {self.photos[image['id']].name} too")
        if name in self.files:
            raise InputError("another photograph has this file name")
        size = image.get("height"), image.get("width")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise InputError(f"its (height, width) is {size}; expected two positive integers")
        file = self.source.find(name)
        if file is None:
            raise InputError("the file is missing")
        return Photo(id=str(image["id"]), name=name, size=size), file

    def add_annotation(self, annotation: Any) -> None:
        where = annotation.get("image_id") if isinstance(annotation, dict) else None
        if isinstance(where, (int, str)) and where in self.photos:
            what = f"annotation {annotation.get('id')} of {self.photos[where].name}"
        else:
            what = f"annotation {annotation.get('id') if isinstance(annotation, dict) else None}"
        try:
            instance = self._instance(annotation)
        except InputError as error:
            self.problems.append(Problem(what, str(error)))
            return
        self.seen.add(instance.id)
        self.instances[where].append(instance)

    def _instance(self, annotation: Any) -> Instance:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("id"), (int, str)):
            raise InputError(f"it has no id; got {annotation!r:.200}")
        where, category = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(where, (int, str)) or where not in self.photos:
            known = isinstance(where, (int, str)) and where in self.missing
            state = "is left out" if known else "does not exist"
            raise InputError(f"its photo of id {where!r} {state}")
        if str(annotation["id"]) in self.seen:
            raise InputError("another annotation has this id")
        if category is not None and (
            not isinstance(category, int) or category not in self.categories
        ):
            raise InputError(f"its category of id {category!r} does not exist")
        size = self.photos[where].size
        assert size is not None
        return make_instance(
            id=annotation["id"],
            segmentation=annotation.get("segmentation"),
            size=size,
            bbox=annotation.get("bbox"),
            area=annotation.get("area"),
            crowd=bool(annotation.get("iscrowd", 0)),
            category=category,
        )

    def result(self) -> tuple[Photo, ...]:
        return tuple(
            Photo(photo.id, photo.name, photo.size, tuple(self.instances[key]))
            for key, photo in self.photos.items()
        )


def _photo_name(image: Any) -> str | None:
    """`file_name`; LVIS has none: the end of `coco_url`, such as "val2017/000000000139.jpg"."""
    if not isinstance(image, dict):
        return None
    if isinstance(name := image.get("file_name"), str):
        return name
    url = image.get("coco_url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) else None
