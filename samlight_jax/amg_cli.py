"""The command `samlight amg`: every mask of every photograph of a folder, restartable.

What is written for one photograph appears whole or not at all, and is what a later run skips. The
hidden folder `.parts` in the output holds one file of annotations a photograph; the COCO JSON is
made of them at the end of each run, photograph by photograph. `--engine ray` goes another way: see
`engine_ray`.

Source of the PNG folders and of metadata.csv: segment-anything, `scripts/amg.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track

from samlight_jax import automatic_mask_generator_runs as runs
from samlight_jax import engine_ray, weights
from samlight_jax.automatic_mask_generator import SamAutomaticMaskGenerator
from samlight_jax.build_sam import DEFAULT, keep_compilations, load
from samlight_jax.engine_ray import NO_ENGINE, Engine
from samlight_jax.engine_ray_parts import is_photograph
from samlight_jax.errors import InputError
from samlight_jax.preprocess import as_array
from samlight_jax.sam import Sam

PARTS = ".parts"
SETTINGS = "settings.json"
COCO = "annotations.json"
COLUMNS = (
    *("id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y"),
    *("predicted_iou", "stability_score"),
    *("crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h"),
)


@dataclasses.dataclass(frozen=True)
class Generator:
    """The arguments of `SamAutomaticMaskGenerator`.

    Attributes:
      points_per_side: points of the grid on each side.
      points_per_batch: points decoded at once; a matter of memory and speed.
      pred_iou_thresh: masks with a predicted IoU above it stay; 0 keeps all.
      stability_score_thresh: masks with this stability score or more stay; 0 keeps all.
      stability_score_offset: how far the score moves the threshold of the logits.
      box_nms_thresh: box IoU above which the worse of two masks goes.
      crop_n_layers: layers of crops to look at again; layer i has 4**i.
      crop_nms_thresh: the same as box_nms_thresh, between crops.
      crop_overlap_ratio: how much the first layer's crops overlap, of the short side.
      crop_n_points_downscale_factor: the grid's side is divided by it in each layer.
      min_mask_region_area: holes and islands of fewer pixels are removed.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def of(self, model: Sam) -> SamAutomaticMaskGenerator:
        """The generator, with run lengths as its output."""
        arguments = dataclasses.asdict(self)
        return SamAutomaticMaskGenerator(model, **arguments, output_mode="uncompressed_rle")

    def build(self, model: Sam) -> Callable[[np.ndarray], list[dict[str, Any]]]:
        """See `engine_ray_work.Task`."""
        generator = self.of(model)
        return lambda image: list(_annotations(generator.generate(image)))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One photograph and what is to be made of it; None: not wanted."""

    photo: Path
    part: Path | None
    folder: Path | None

    def missing(self) -> _Job:
        """The same with only what is not there yet."""
        part, folder = (
            None if path is None or path.exists() else path for path in (self.part, self.folder)
        )
        return dataclasses.replace(self, part=part, folder=folder)


def amg(
    folder: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")
    ],
    *,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")],
    format: Literal["coco", "png", "both", "parquet"] | None = None,
    model: str = DEFAULT,
    generator: Annotated[Generator, tyro.conf.arg(name="")] = Generator(),
    engine: Annotated[Engine, tyro.conf.arg(name="")] = NO_ENGINE,
) -> None:
    """Finds every mask of every photograph of a folder, without a prompt.

    A run that was killed goes on where it was, with the same command. A photograph that cannot be
    used is reported and skipped. The exit code is 0 if all photographs went well, 1 if some did
    not, 2 if none did or the call was wrong.

    Args:
      folder: photographs, directly in it; or one photograph. More than one with an engine.
      output: for coco, annotations.json with uncompressed run lengths; for png, for each
        photograph a folder of its name with 0.png, 1.png ... and metadata.csv.
      format: what to write: both; with an engine parquet or coco, parquet.
      model: a model file, or the name of one (see `samlight models`).
      generator: see below.
      engine: see below.
    """
    distributed = engine.chosen()
    if not folder:
        raise InputError("No folder was given: samlight amg FOLDER --output OUT")
    if distributed:
        if format in ("png", "both"):
            raise InputError(f"--format {format}: with --engine ray expected parquet or coco.")
        form = "coco" if format == "coco" else "parquet"
        engine_ray.run(engine, "amg", generator, folder, output, form, model)
    elif format == "parquet":
        raise InputError("--format parquet needs --engine ray.")
    elif len(folder) != 1:
        raise InputError(f"Got {len(folder)} folders; expected one, or more with --engine ray.")
    else:
        _amg_here(Path(folder[0]), Path(output), format or "both", model, generator)


def _amg_here(folder: Path, output: Path, form: str, model: str, generator: Generator) -> None:
    photos = _photographs(folder)
    jobs = [
        _Job(
            photo,
            None if form == "png" else output / PARTS / f"{photo.stem}.jsonl",
            None if form == "coco" else output / photo.stem,
        )
        for photo in photos
    ]
    keep_compilations()
    sam = load(model)
    generate = generator.of(sam)
    _settle(output, folder, weights.fingerprint(sam.config, weights.arrays_of(sam)), generator)
    failures = _run(generate, [_clean(job).missing() for job in jobs])
    if form != "png":
        parts = [job.part for job in jobs if job.part and job.part.exists()]
        weights.write_whole(output / COCO, lambda scratch: _write_coco(scratch, parts))
    if failures == len(photos):
        raise InputError(f"No photograph of {folder} could be used; the lines above say why.")
    if failures:
        print(f"{failures} of {len(photos)} photographs were skipped.", file=sys.stderr)
        raise SystemExit(1)


def _photographs(folder: Path) -> list[Path]:
    """The files that Pillow may read, by name."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    photos = sorted(p for p in folder.iterdir() if is_photograph(p.name) and p.is_file())
    if not photos:
        raise InputError(f"There is no photograph in {folder}; its own folders are not searched.")
    name, count = collections.Counter(path.stem for path in photos).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{count} photographs in {folder} are called {name}; one's masks would replace the "
            "other's: rename one."
        )
    return photos


def _settle(output: Path, folder: Path, fingerprint: str, generator: Generator) -> None:
    """Notes what the output is made with, or refuses to mix it with something else."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder.")
    settings = {
        "folder": str(folder.resolve()),
        "model": fingerprint,
        **dataclasses.asdict(generator),
    }
    path = output / SETTINGS
    if not path.exists():
        weights.write_whole(path, lambda scratch: scratch.write_text(json.dumps(settings)))
        return
    try:
        there = json.loads(path.read_text())
        changed = [name for name in settings if there[name] != settings[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what this command writes ({error}).") from None
    if changed:
        name = changed[0]
        raise InputError(
            f"{output} was made with {name} {there[name]}, not {settings[name]}; give another "
            "--output, or remove it."
        )


def _clean(job: _Job) -> _Job:
    """Removes what a killed run was writing; see `weights.write_whole`."""
    for path in (job.part, job.folder):
        if path and path.parent.exists():
            prefix = f".{path.name}."
            for left in os.scandir(path.parent):
                if left.name.startswith(prefix):
                    shutil.rmtree(left.path)
    return job


def _run(generator: SamAutomaticMaskGenerator, jobs: Sequence[_Job]) -> int:
    """Does the jobs; how many photographs could not be used."""
    console = Console(stderr=True)
    failures = 0
    for job in track(jobs, "segmenting", console=console):
        if job.part is None and job.folder is None:
            continue
        try:
            image = np.asarray(as_array(job.photo))
            masks = generator.generate(image)
        except InputError as error:
            failures += 1
            console.print(f"skipped: {_named(error, job.photo)}", markup=False, soft_wrap=True)
            continue
        _write(job, image.shape[:2], masks)
    return failures


def _named(error: InputError, photo: Path) -> str:
    sentence = str(error)
    return sentence if str(photo) in sentence else f"{photo}: {sentence}"


def _write(job: _Job, size: Sequence[int], masks: Sequence[dict[str, Any]]) -> None:
    """Each wanted form, whole."""
    if job.folder:
        weights.write_whole(job.folder, lambda scratch: _write_pngs(scratch, masks))
    if job.part:
        text = "\n".join(map(json.dumps, _rows(job.photo, size, masks))) + "\n"
        weights.write_whole(job.part, lambda scratch: scratch.write_text(text))


def _write_pngs(folder: Path, masks: Sequence[dict[str, Any]]) -> None:
    """SAM's folder: a picture of 0 and 255 a mask, and a table."""
    folder.mkdir()
    lines = [",".join(COLUMNS)]
    for i, mask in enumerate(masks):
        rle = mask["segmentation"]
        pixels = runs.mask_of(np.array(rle["counts"]), rle["size"])
        Image.fromarray(pixels.astype(np.uint8) * 255).save(folder / f"{i}.png")
        values = [i, mask["area"], *mask["bbox"], *mask["point_coords"][0]]
        values += [mask["predicted_iou"], mask["stability_score"], *mask["crop_box"]]
        lines.append(",".join(map(str, values)))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def _rows(
    photo: Path, size: Sequence[int], masks: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """COCO's entry of the photograph, then those of its masks, without their ids."""
    yield {"file_name": photo.name, "height": size[0], "width": size[1]}
    yield from _annotations(masks)


def _annotations(masks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for mask in masks:
        x, y, w, h = mask["bbox"]
        extent = [x, y, w + 1, h + 1] if mask["area"] else [0, 0, 0, 0]  # COCO counts pixels
        yield {**mask, "bbox": extent, "category_id": 1, "iscrowd": 0}


def _write_coco(path: Path, parts: Sequence[Path]) -> None:
    """One JSON of all parts, of which only one is ever in memory."""
    with path.open("w") as out:
        out.write('{"categories": [{"id": 1, "name": "object"}],\n"images": [')
        for image_id, part in enumerate(parts, 1):
            with part.open() as lines:
                entry = json.loads(next(lines))
            out.write(",\n" * (image_id > 1) + json.dumps({"id": image_id, **entry}))
        out.write('],\n"annotations": [')
        number = 0
        for image_id, part in enumerate(parts, 1):
            with part.open() as lines:
                next(lines)
                for line in lines:
                    number += 1
                    entry = {"id": number, "image_id": image_id, **json.loads(line)}
                    out.write(",\n" * (number > 1) + json.dumps(entry))
        out.write("]}\n")
