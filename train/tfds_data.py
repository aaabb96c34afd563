"""Copies that tensorflow-datasets prepared as array_record files; TensorFlow is never imported.

What the features of tfds 4.9.10 hold decides what can be scored:
- `coco/2014`, `coco/2017`: boxes, labels, areas and crowd marks, but no masks. The masks are taken
  from COCO's own JSON file where it is at hand; tfds keeps it in `downloads/extracted`. Without it,
  the photographs come without instances, and a problem says so.
- `coco/2017_panoptic`: an image of segment ids: things and stuff, no pixel in two masks.
- `lvis` (version 1.4.0): a mask for each object, filled by OpenCV from polygons cut to integers, so
  scores differ a little from those of LVIS's JSON file. No marks of crowds.
Preparing a copy needs TensorFlow: `tfds build NAME --file_format=array_record`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from samlight_jax.errors import InputError
from train import coco
from train.annotations import (
    Dataset,
    Instance,
    Photo,
    Problem,
    fingerprint,
    make_instance,
    mask_utils,
)
from train.photographs import decode, stored_size

Found = tuple[Photo | None, list[Problem]]


def open_tfds(name: str, root: Path | None, split: str | None) -> Dataset:
    """Opens a prepared copy; reads every record once, for the annotations.

    Args:
      name: such as "coco/2017" or "lvis".
      root: tfds's `data_dir`, by default ~/tensorflow_datasets; or the folder of one version.
      split: such as "validation"; may be None where there is only one.

    Raises:
      InputError: tfds or the copy is missing, it is no array_record copy, it has no such split, or
        features that are none of the above.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise InputError(
            "tfds data needs the package tensorflow-datasets; pip install 'samlight-jax[tfds]'."
        )
    data_dir = Path("~/tensorflow_datasets").expanduser() if root is None else root
    records = _Records(_version_folder(name, data_dir), split)
    kind = records.features
    if {"image", "image/filename", "objects"} <= kind and (path := _coco_json(records, data_dir)):
        return coco.load(path, records, kind="tfds", name=f"tfds:{name}/{records.split}")
    if {"image", "panoptic_image", "panoptic_objects"} <= kind:
        photo_of = _panoptic_photo
    elif {"image", "objects"} <= kind:
        photo_of = functools.partial(_photo, has_masks=records.has_masks)
    else:
        raise InputError(
            f"tfds:{name} has the features {sorted(kind)}; expected those of coco or lvis."
        )
    return _scan(records, photo_of, f"tfds:{name}/{records.split}")


def _scan(records: _Records, photo_of: Callable[[dict[str, Any]], Found], name: str) -> Dataset:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda i: photo_of(records.example(i)), range(len(records))))
    problems = [problem for _, several in found for problem in several]
    if records.features >= {"objects"} and not records.has_masks:
        problems.append(
            Problem(
                name,
                "it has boxes but no masks, so no instance can be scored: put COCO's own "
                "instances_<split>.json into the folder annotations of the root, or use "
                "coco/2017_panoptic or lvis",
            )
        )
    records.index = {photo.name: i for i, (photo, _) in enumerate(found) if photo}
    photos = tuple(photo for photo, _ in found if photo)
    if not photos:
        raise InputError(f"{name} holds no photograph that can be read: prepare the copy again.")
    counts = (instance.rle["counts"] for photo in photos for instance in photo.instances)
    return Dataset(
        name=name,
        kind="tfds",
        photos=photos,
        categories=records.categories,
        problems=problems,
        fingerprint=fingerprint([name, *records.index, *counts]),
        pixels=functools.partial(records.read, upright=False),
    )


class _Records:
    """One split: random access by number, and by name once `index` is there."""

    def __init__(self, folder: Path, split: str | None):
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise InputError(
                f"split={split!r}: {folder} holds {', '.join(splits)}; name one of them."
            )
        self.folder, self.split = folder, str(split)
        info: Any = builder.info.features
        self.features = frozenset(info)
        objects = next((info[key] for key in ("objects", "panoptic_objects") if key in info), None)
        inner = {} if objects is None else objects.feature
        self.has_masks = "segmentation" in inner
        names: list[str] = inner["label"].names or [] if "label" in inner else []
        self.categories = dict(enumerate(names))
        skip = {"image": tfds.decode.SkipDecoding()}  # the stored bytes, decoded by `decode`
        try:
            self._source = builder.as_data_source(split, decoders=skip)
        except NotImplementedError:
            raise InputError(
                f"{folder} is not in array_record format, which random access needs; prepare the "
                "copy again with `tfds build --file_format=array_record`."
            ) from None

    def __len__(self) -> int:
        return len(self._source)

    def example(self, i: int) -> dict[str, Any]:
        return self._source[i]

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Numbers of the records by name."""
        return {_name(self.example(i)): i for i in range(len(self))}

    def find(self, wanted: str) -> str | None:
        return wanted if wanted in self.index else None

    def read(self, name: str, *, upright: bool) -> np.ndarray:
        if name not in self.index:
            raise InputError(f"{self.folder} holds no photograph {name!r}.")
        return decode(self.example(self.index[name])["image"], name, upright=upright)


def _version_folder(name: str, data_dir: Path) -> Path:
    """The newest version of a prepared copy: the folder with its `dataset_info.json`."""
    if (data_dir / "dataset_info.json").exists():
        return data_dir
    found = [path.parent for path in (data_dir / name).glob("*/dataset_info.json")]
    if not found:
        raise InputError(
            f"{data_dir / name} holds no copy prepared by tfds; expected "
            f"{data_dir / name}/<version>/dataset_info.json: prepare one where TensorFlow is, with "
            f"`tfds build {name} --file_format=array_record`."
        )
    return max(
        found, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")]
    )


def _coco_json(records: _Records, data_dir: Path) -> Path | None:
    """COCO's own annotations of the split, or None."""
    split = {"validation": "val"}.get(records.split, records.split)
    year = records.folder.parent.name
    for pattern in ("annotations", "downloads/extracted/*/annotations"):
        if found := sorted(data_dir.glob(f"{pattern}/instances_{split}{year}.json")):
            return found[0]
    return None


def _name(example: dict[str, Any]) -> str:
    """The file name; lvis has none, and its ids are the numbers of COCO's file names."""
    if "image/filename" in example:
        return example["image/filename"].decode()
    return f"{int(example['image/id']):012d}.jpg"


def _photo(example: dict[str, Any], *, has_masks: bool) -> Found:
    objects = example["objects"]
    if not has_masks:
        return _with_instances(example, objects, [])
    return _with_instances(example, objects, [mask[..., 0] > 0 for mask in objects["segmentation"]])


def _panoptic_photo(example: dict[str, Any]) -> Found:
    # A segment's id is its colour, red + 256 green + 65536 blue; other photographs have it too.
    colours = example["panoptic_image"].astype(np.int64) @ np.array([1, 256, 65536])
    objects = dict(example["panoptic_objects"])
    masks = [colours == key for key in objects["id"]]
    objects["id"] = [f"{example['image/id']}/{key}" for key in objects["id"]]
    return _with_instances(example, objects, masks)


def _with_instances(example: dict[str, Any], objects: Any, masks: list[np.ndarray]) -> Found:
    name = _name(example)
    try:
        height, width = size = stored_size(example["image"], name)
    except InputError as error:
        return None, [Problem(f"photo {name}", str(error))]
    instances: list[Instance] = []
    problems: list[Problem] = []
    for i, mask in enumerate(masks):
        # tfds stores y1, x1, y2, x2 as parts of the height and width.
        y1, x1, y2, x2 = (
            objects["bbox"][i].astype(float) * (height, width, height, width)
        ).tolist()
        try:
            instances.append(
                make_instance(
                    id=objects["id"][i],
                    segmentation=mask_utils.encode(np.asfortranarray(mask, np.uint8)),
                    size=size,
                    bbox=(x1, y1, x2 - x1, y2 - y1),
                    area=objects["area"][i],
                    crowd=bool(objects["is_crowd"][i]) if "is_crowd" in objects else False,
                    category=int(objects["label"][i]),
                )
            )
        except InputError as error:
            problems.append(Problem(f"annotation {objects['id'][i]} of {name}", str(error)))
    return Photo(str(example["image/id"]), name, size, tuple(instances)), problems
