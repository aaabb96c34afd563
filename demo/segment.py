"""The main job on real photographs: `make demo` runs it.

Segments the photographs that scikit-image ships with a point, a box, and a positive plus a negative
point; writes the overlays and a sheet of them beside this file and prints a table.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data

import samlight_jax
from samlight_jax.draw import overlay
from samlight_jax.errors import exit_on_error

FOLDER = Path(__file__).parent
TILE = (400, 300)
# x, y in pixels; a point's third number is its label, 1 foreground, 0 background.
PHOTOGRAPHS: dict[str, tuple[dict[str, Any], ...]] = {
    "coffee": (
        {"points": [(250, 200, 1)]},
        {"box": (170, 15, 415, 245)},
        {"points": [(250, 120, 1), (90, 150, 0)]},
    ),
    "chelsea": (
        {"points": [(225, 150, 1)]},
        {"box": (292, 102, 345, 170)},
        {"points": [(140, 120, 1), (230, 260, 0)]},
    ),
    "astronaut": (
        {"points": [(220, 110, 1)]},
        {"box": (278, 340, 511, 511)},
        {"points": [(220, 420, 1), (220, 110, 0)]},
    ),
}


def main() -> None:
    """Writes demo/*.png and prints prompt, predicted IoU, area and milliseconds."""
    predictor = samlight_jax.SamPredictor()
    sheet = Image.new("RGB", (3 * TILE[0], 3 * TILE[1]))
    table = Table("photograph", "prompt", "predicted IoU", "area (px)", "ms", "overlay")
    # The first call compiles: it is not what a second photograph costs.
    predictor.set_image(data.coffee())
    predictor.predict(box=(170, 15, 415, 245))
    for row, (name, prompts) in enumerate(PHOTOGRAPHS.items()):
        image = getattr(data, name)()
        start = time.perf_counter()
        predictor.set_image(image)
        np.asarray(predictor.get_image_embedding())
        table.add_row(name, "(encoder)", "", "", f"{1e3 * (time.perf_counter() - start):.0f}", "")
        for column, prompt in enumerate(prompts):
            points, box = prompt.get("points", ()), prompt.get("box")
            start = time.perf_counter()
            masks, iou, _ = predictor.predict(
                point_coords=[p[:2] for p in points] or None,
                point_labels=[p[2] for p in points] or None,
                box=box,
                multimask_output=len(points) == 1,
            )
            ms = 1e3 * (time.perf_counter() - start)
            best = int(np.argmax(iou))
            kind = "box" if box else ("point", "points")[len(points) > 1]
            file = FOLDER / f"{name}_{kind}.png"
            picture = overlay(image, masks[best], points=points, box=box)
            picture.save(file)
            sheet.paste(picture.resize(TILE), (column * TILE[0], row * TILE[1]))
            score = float(np.clip(iou[best], 0, 1))
            area = f"{masks[best].sum():,}"
            where = f"demo/{file.name}"
            table.add_row("", str(box or points), f"{score:.3f}", area, f"{ms:.0f}", where)
    sheet.save(FOLDER / "sheet.png")
    Console(width=120).print(table)


if __name__ == "__main__":
    exit_on_error(main)
