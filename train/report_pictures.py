"""The report's pictures: best, median and worst instances beside their truth; plots of the IoU."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from samlight_jax.draw import overlay
from samlight_jax.weights import write_whole
from train.annotations import Dataset
from train.evaluator import Evaluator
from train.evaluator_batch import Record

VIEW = (288, 216)  # of one picture, pixels
GAP, CAPTION, HEADING = 8, 22, 40
COLUMNS = 3
PAPER, EMPTY, INK, PALE = (255, 255, 255), (240, 240, 240), (30, 30, 30), (110, 110, 110)
BLUE, RED = "#1e90ff", "#d55e00"


def draw(
    folder: Path,
    evaluator: Evaluator,
    dataset: Dataset,
    records: Mapping[str, Record],
    count: int,
    title: str,
) -> None:
    """Writes contact.jpg (`count` instances a band), iou_histogram.png and iou_by_area.png.

    Args:
      folder: to write to.
      evaluator: makes the masks of the chosen instances once more.
      dataset: of the photographs.
      records: by photograph.
      count: instances a band; 0 for plots alone.
      title: what was evaluated, in a few words.
    """
    scored = [
        (instance.get("iou", instance.get("agreement")), photo, instance)
        for photo, record in records.items()
        for instance in record["instances"]
    ]
    scored = [each for each in scored if each[0] is not None]
    if not scored:
        return
    name = "agreement IoU" if evaluator.engine.protocol.prompt == "teacher-grid" else "IoU"
    values = np.array([value for value, _, _ in scored])
    areas = np.array([instance["area"] for _, _, instance in scored])
    _save(folder / "iou_histogram.png", _histogram(values, name, title))
    _save(folder / "iou_by_area.png", _by_area(values, areas, name, title))
    if count:
        title = f"{title}: {len(values)} instances, mean {name} {values.mean():.3f}"
        sheet = _sheet(evaluator, dataset, bands(scored, count), name, title)
        write_whole(folder / "contact.jpg", lambda scratch: sheet.save(scratch, "JPEG", quality=88))


def bands(scored: Sequence[tuple[float, str, Any]], count: int) -> dict[str, list[Any]]:
    """The best, the middle and the worst, each of photographs of its own while there are enough."""
    ranked = sorted(scored, key=lambda each: (-each[0], each[1], each[2]["id"]))
    middle = np.argsort(np.abs(np.arange(len(ranked)) - (len(ranked) - 1) / 2), kind="stable")
    orders = {"Best": ranked, "Median": [ranked[i] for i in middle], "Worst": ranked[::-1]}
    found = {}
    for name, order in orders.items():
        firsts: dict[str, Any] = {}
        for each in order:
            firsts.setdefault(each[1], each)
        chosen = [*firsts.values()][:count]
        chosen += [each for each in order if each not in chosen][: count - len(chosen)]
        found[name] = sorted(chosen, key=ranked.index)
    return found


def _sheet(
    evaluator: Evaluator, dataset: Dataset, found: Mapping[str, list[Any]], name: str, title: str
) -> Image.Image:
    wanted = {photo for band in found.values() for _, photo, _ in band}
    photos = {photo.id: photo for photo in dataset.photos if photo.id in wanted}
    again = evaluator.masks_of(dataset, list(photos.values()))
    truths = {
        (photo.id, instance.id): instance.rle for photo in photos.values()
        for instance in photo.instances
    }  # fmt: skip
    cell = 2 * VIEW[0] + 3 * GAP, VIEW[1] + CAPTION + GAP
    rows = {band: -(-len(each) // COLUMNS) for band, each in found.items()}
    height = HEADING + sum(HEADING + count * cell[1] for count in rows.values()) + GAP
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, height), PAPER)
    pen, top = ImageDraw.Draw(sheet), HEADING
    pen.text((2 * GAP, HEADING // 2), title, INK, ImageFont.load_default(22), anchor="lm")
    left_name = "teacher" if name != "IoU" else "truth"
    for band, each in found.items():
        pen.text((2 * GAP, top + HEADING // 2), band, INK, ImageFont.load_default(22), anchor="lm")
        what = f"left: {left_name}, right: prediction; green: the prompt"
        what += ", red: background clicks" * bool(evaluator.engine.protocol.refine)
        pen.text((120, top + HEADING // 2), what, PALE, ImageFont.load_default(14), anchor="lm")
        for i, (value, photo, instance) in enumerate(each):
            x = GAP + i % COLUMNS * cell[0]
            y = top + HEADING + i // COLUMNS * cell[1]
            remade = again[photo, instance["id"]]
            truth = remade.get("truth") or truths[photo, instance["id"]]
            image = dataset.read(photos[photo])
            for k, rle in enumerate((truth, remade["rle"])):
                view = _view(image, [_mask(truth), _mask(remade["rle"])], _mask(rle), remade)
                at = x + GAP + k * (VIEW[0] + GAP // 2)
                pen.rectangle((at, y, at + VIEW[0] - 1, y + VIEW[1] - 1), fill=EMPTY)
                sheet.paste(
                    view, (at + (VIEW[0] - view.width) // 2, y + (VIEW[1] - view.height) // 2)
                )
            text = f"{name} {value:.3f}   {Path(photos[photo].name).name}, {instance['id']}"
            place = (x + GAP, y + VIEW[1] + CAPTION // 2)
            pen.text(place, text[:70], INK, ImageFont.load_default(14), anchor="lm")
        top += HEADING + rows[band] * cell[1]
    return sheet


def _mask(rle: Any) -> np.ndarray:
    return coco_mask.decode(rle).astype(bool)


def _view(
    image: np.ndarray, masks: list[np.ndarray], shown: np.ndarray, prompt: Record
) -> Image.Image:
    """The part of the photograph around the masks and the prompt, scaled to fit VIEW."""
    x1, y1, x2, y2 = window(masks, prompt, image.shape[:2])
    scale = min(VIEW[0] / (x2 - x1), VIEW[1] / (y2 - y1))
    size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    part = Image.fromarray(image[y1:y2, x1:x2]).resize(size, Image.Resampling.BILINEAR)
    mask = Image.fromarray(shown[y1:y2, x1:x2]).resize(size, Image.Resampling.NEAREST)
    box = prompt["box"] and [
        (side - start) * scale for side, start in zip(prompt["box"], (x1, y1, x1, y1), strict=True)
    ]
    points = [
        ((x + 0.5 - x1) * scale, (y + 0.5 - y1) * scale, label) for x, y, label in prompt["points"]
    ]
    return overlay(np.asarray(part), np.asarray(mask), points=points, box=box)


def window(
    masks: list[np.ndarray], prompt: Record, size: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around all there is to see, of VIEW's shape where the photograph allows it.

    With some room around, and a third of the photograph at least.
    """
    corners = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        if len(rows):
            corners += [(columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)]
    if prompt["box"]:
        corners += [prompt["box"][:2], prompt["box"][2:]]
    corners += [point[:2] for point in prompt["points"]]
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    full = np.array(size[::-1])
    side = np.maximum(1.2 * (high - low), full / 3)
    side = np.minimum(np.maximum(side, (side / VIEW).max() * np.array(VIEW)), full)
    start = np.clip((low + high - side) / 2, 0, full - side)
    x1, y1 = np.floor(start).astype(int).tolist()
    x2, y2 = np.minimum(np.ceil(start + side), full).astype(int).tolist()
    return x1, y1, x2, y2


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def _histogram(values: np.ndarray, name: str, title: str) -> Any:
    figure, axes = _figure(f"{title}: {len(values)} instances, mean {name} {values.mean():.3f}")
    axes.hist(values, bins=np.linspace(0, 1, 21).tolist(), color=BLUE, edgecolor="white")
    axes.axvline(values.mean(), color=RED, linewidth=2)
    axes.set(xlabel=name, ylabel="instances", xlim=(0, 1))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _by_area(values: np.ndarray, areas: np.ndarray, name: str, title: str) -> Any:
    figure, axes = _figure(f"{title}: {len(values)} instances; dashed: COCO's area classes")
    side = np.sqrt(np.maximum(areas, 1))
    axes.scatter(side, values, s=10, color=BLUE, alpha=0.4, linewidths=0)
    edges = np.quantile(side, np.linspace(0, 1, 9)) if len(side) >= 40 else np.array([])
    groups = [(side >= low) & (side <= high) for low, high in itertools.pairwise(edges)]
    middle = [(np.median(side[g]), np.median(values[g])) for g in groups if g.any()]
    if middle:
        axes.plot(*zip(*middle, strict=True), color=RED, linewidth=2, label="median of an eighth")
        axes.legend(frameon=False, loc="lower right")
    for edge in (32, 96):
        axes.axvline(edge, color="0.7", linewidth=1, linestyle="--")
    axes.set(xlabel="square root of the area, pixels", ylabel=name, ylim=(-0.02, 1.02))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    return figure


def _save(path: Path, figure: Any) -> None:
    content = io.BytesIO()
    # Without matplotlib's version and date: the same values give the same file.
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_whole(path, lambda scratch: scratch.write_bytes(content.getvalue()))
