"""The command line `samlight`."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from samlight_jax import engine_ray, prompts, weights
from samlight_jax.amg_cli import amg
from samlight_jax.attention import backends
from samlight_jax.build_sam import DEFAULT, cache_folder, find, keep_compilations
from samlight_jax.config import PRESETS, Pattern, ViTConfig
from samlight_jax.demo import demo
from samlight_jax.draw import overlay
from samlight_jax.engine_ray import NO_ENGINE, Engine
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.export import export
from samlight_jax.predictor import SamPredictor
from samlight_jax.preprocess import Frame, as_array
from samlight_jax.sam import Sam

_arg = tyro.conf.arg


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt for all photographs: (x, y, label) points, a box of four corners, or both."""

    points: list[tuple[float, float, int]]
    box: list[float] | None

    def build(self, model: Sam) -> Callable[[np.ndarray], list[dict[str, Any]]]:
        """See `engine_ray_work.Task`."""
        points = np.array(self.points)[None] if self.points else None
        with warnings.catch_warnings():  # of points outside, each photograph's own
            warnings.simplefilter("ignore")
            prompts.check(
                Frame((1024, 1024), model.config.image_size),
                model.config,
                None if points is None else points[..., :2],
                None if points is None else points[..., 2],
                None if self.box is None else np.array([self.box]),
                None,
                absent=False,
            )
        predictor = SamPredictor(model)

        def annotations(image: np.ndarray) -> list[dict[str, Any]]:
            predictor.set_image(image)
            return [{**self.answer(predictor)[1], "category_id": 1, "iscrowd": 0}]

        return annotations

    def answer(self, predictor: SamPredictor) -> tuple[np.ndarray, dict[str, Any]]:
        """The best mask of the image that was set, and what is told of it."""
        masks, iou, _ = predictor.predict(
            point_coords=[p[:2] for p in self.points] if self.points else None,
            point_labels=[p[2] for p in self.points] if self.points else None,
            box=self.box,
            multimask_output=self.box is None and len(self.points) == 1,
        )
        best = int(np.argmax(iou))
        mask = masks[best]
        return mask, {
            "predicted_iou": round(float(np.clip(iou[best], 0, 1)), 4),
            "area": int(mask.sum()),
            "bbox": _bounding_box(mask),
            "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
        }


def predict(
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], _arg(metavar="PHOTO [PHOTO ...]")],
    *,
    point: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _arg(metavar="X,Y[,LABEL]")] = (),
    box: Annotated[str | None, _arg(metavar="X1,Y1,X2,Y2")] = None,
    model: str = DEFAULT,
    output: Annotated[str | None, _arg(aliases=["-o"], metavar="PATH")] = None,
    json_output: Annotated[Path | None, _arg(name="json", metavar="FILE")] = None,
    engine: Annotated[Engine, _arg(name="")] = NO_ENGINE,
) -> None:
    """Segments photographs: one prompt (points, a box, or both), the best mask of each.

    A single point asks for three masks and takes the one with the highest predicted IoU; a box or
    several points ask for one, as SAM advises.

    Args:
      images: photographs; the prompt is the same for all. With an engine: folders of them, too.
      point: x,y or x,y,label in photograph pixels; label 1 (the default) is foreground, 0
        background. May be repeated.
      box: x1,y1,x2,y2 in photograph pixels.
      model: a model file, or the name of one (see `samlight models`).
      output: the overlay to write; a folder where there are several photographs; with an engine
        a folder of Parquet files.
      json_output: a JSON file to write: scores, boxes, areas and run-length masks.
      engine: see below.
    """
    distributed = engine.chosen()
    prompt = Prompt(
        [_point(text) for text in point],
        _numbers("--box", box, "x1,y1,x2,y2", (4,)) if box else None,
    )
    if not images:
        raise InputError("No photograph was given: samlight predict PHOTO --point x,y")
    if not prompt.points and prompt.box is None:
        raise InputError("No prompt was given; add --point x,y or --box x1,y1,x2,y2.")
    if not distributed:
        paths = [Path(image) for image in images]
        _predict_here(paths, prompt, Path(output) if output else None, json_output, model)
    elif output is None or json_output:
        raise InputError("--engine ray writes Parquet files: give it --output FOLDER, no --json.")
    else:
        engine_ray.run(engine, "predict", prompt, images, output, "parquet", model)


def _predict_here(
    images: Sequence[Path],
    prompt: Prompt,
    output: Path | None,
    json_output: Path | None,
    model: str,
) -> None:
    if output and len(images) > 1 and output.suffix:
        raise InputError(
            f"--output {output} is one file for {len(images)} photographs; give a folder."
        )
    if output and len(images) > 1 and len({image.stem for image in images}) < len(images):
        raise InputError("Two photographs have the same name; --output would overwrite one.")

    keep_compilations()
    predictor = SamPredictor(model)
    rows, failures = [], []
    for image in _progress(images):
        target = output
        if output and (len(images) > 1 or not output.suffix):
            target = output / f"{image.stem}.png"
        try:
            rows.append(_segment(predictor, image, prompt, target))
        except InputError as error:
            if len(images) == 1:
                raise
            failures.append(str(error))
    if json_output:
        text = json.dumps(rows)
        weights.write_whole(json_output, lambda scratch: scratch.write_text(text))
    columns = ("image", "predicted_iou", "area", "bbox", "seconds")
    _print_columns(columns, *(tuple(str(row[name]) for name in columns) for row in rows))
    if failures:
        sentences = "; ".join(failures)
        raise InputError(f"{len(failures)} of {len(images)} photographs failed: {sentences}")


def _segment(
    predictor: SamPredictor, path: Path, prompt: Prompt, target: Path | None
) -> dict[str, Any]:
    """One photograph: writes its overlay, returns its row of the table and of the JSON."""
    start = time.perf_counter()
    image = np.asarray(as_array(path))
    predictor.set_image(image)
    mask, told = prompt.answer(predictor)
    seconds = time.perf_counter() - start
    if target:
        picture = overlay(image, mask, points=prompt.points, box=prompt.box)
        weights.write_whole(target, lambda scratch: picture.save(scratch, "PNG"))
    return {
        "image": str(path),
        **told,
        **dataclasses.asdict(prompt),
        "seconds": round(seconds, 4),
    }


def _point(text: str) -> tuple[float, float, int]:
    x, y, label = (*_numbers("--point", text, "x,y or x,y,label", (2, 3)), 1)[:3]
    if label not in (0, 1):
        raise InputError(f"--point {text}: the label is {label:g}; expected 1 or 0.")
    return x, y, int(label)


def _numbers(flag: str, text: str, form: str, counts: Sequence[int]) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise InputError(f"{flag} {text}: expected {form}, numbers with commas and no spaces.")
    return numbers


def _bounding_box(mask: np.ndarray) -> list[int]:
    """x, y, width, height, as in COCO; zeros where the mask is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with background."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _progress(images: Sequence[Path]) -> Iterable[Path]:
    console = Console(stderr=True)
    return track(images, "segmenting", console=console, disable=len(images) == 1)


def _print_columns(*rows: Sequence[str]) -> None:
    """Aligned columns, never wrapped, so that other programs can read them too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def models() -> None:
    """Lists the models, their parameters, and where their weights come from."""
    rows = []
    for name, config in PRESETS.items():
        count = sum(math.prod(array.shape) for array in weights.expected(config).values())
        try:
            where = str(find(name))
        except InputError as error:
            where = str(error)
        rows.append((name, f"{count / 1e6:.1f} M", where))
    _print_columns(("model", "parameters", "weights"), *rows)


def info(checkpoint: tyro.conf.Positional[str]) -> None:
    """Prints what a model file holds: parameters, source, licence, config, checksum, metrics.

    Args:
      checkpoint: a .safetensors file or an orbax directory that this package wrote, or a name.
    """
    path = find(checkpoint)
    arrays, config, header = weights.read(path)
    count = sum(array.size for array in arrays.values())
    metrics = _metrics(header)
    if metrics:
        del header["metrics"]
    first = {key: header.pop(key) for key in ("source", "licence") if key in header}
    _print_columns(
        ("file", str(path)),
        ("model", config.name),
        ("parameters", f"{count:,} in {len(arrays)} arrays"),
        ("dtypes", ", ".join(sorted({str(array.dtype) for array in arrays.values()}))),
        *first.items(),
        *sorted(header.items()),
    )
    if metrics:
        print()
        _print_columns(("protocol", "set", "metric", "n", "value", "95 % interval"), *metrics)


def _metrics(header: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The rows that train/release.py wrote; none where there are none, or others'."""
    try:
        return [
            (
                *(str(row[key]) for key in ("protocol", "set", "metric", "n")),
                f"{row['value']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
            )
            for row in json.loads(header.get("metrics", "[]"))
        ]
    except (ValueError, KeyError, TypeError):
        return []


def doctor() -> None:
    """Tells what this machine would run: JAX, devices, weights, and the attention back ends.

    Where a faster back end is passed over, its sentence says why.
    """
    present = [name for name in PRESETS if _is_there(name)]
    versions = {name: _version(name) for name in ("samlight-jax", "jax", "jaxlib", "jax-triton")}
    facts = [
        *versions.items(),
        ("cache folder", str(cache_folder())),
        ("weights there", ", ".join(present) or "none; `samlight models` says how to get them"),
    ]
    try:
        devices = jax.devices()
    except RuntimeError as error:  # a plugin that finds no driver: what a doctor is called for
        _print_columns(*facts, ("devices", f"JAX finds none: {str(error).splitlines()[0]}"))
        return
    for (kind, capability), count in collections.Counter(map(_kind, devices)).items():
        facts.append(("devices", f"{count} x {kind}{capability}"))
    _print_columns(*facts)
    _print_backends()


def _print_backends() -> None:
    """What would run each model's attention, and why nothing better."""
    dtypes = ("bfloat16", "float32")
    table = [("model", "attention", *dtypes)]
    refusals = collections.Counter()
    for name, config in PRESETS.items():
        if not isinstance(config.encoder, ViTConfig):
            continue
        for pattern in dict.fromkeys(config.encoder.attention):
            chosen = []
            for dtype in dtypes:
                reasons = backends(config, pattern, dtype)
                chosen.append(next(n for n, reason in reasons.items() if reason is None))
                earlier = list(reasons.items())[: list(reasons).index(chosen[-1])]
                refusals.update(earlier)
            table.append((name, _pattern(pattern), *chosen))
    print()
    _print_columns(*table)
    calls = len(dtypes) * (len(table) - 1)
    if refusals:
        print()
        rows = ((name, f"{n} of {calls}", str(why)) for (name, why), n in refusals.items())
        _print_columns(("passed over", "calls", "why"), *rows)


def _is_there(name: str) -> bool:
    try:
        find(name)
    except InputError:
        return False
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kind(device: Any) -> tuple[str, str]:
    """The maker's name, and CUDA's compute capability where there is one."""
    capability = getattr(device, "compute_capability", None)
    kind = f"{device.device_kind} ({device.platform})"
    return kind, f", compute capability {capability}" if capability else ""


def _pattern(pattern: Pattern) -> str:
    segment = pattern.segment
    if segment is None:
        return "all tokens"
    shape = (segment,) if isinstance(segment, int) else segment
    text = f"segment {'x'.join(map(str, shape))}"
    return f"{text}, dilation {pattern.dilation}" if pattern.dilation > 1 else text


def main() -> None:
    """Runs the command line; bad input ends it with one sentence and exit code 2."""

    def warn(message, *_args, **_kwargs) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = warn
    commands = dict(
        predict=predict,
        amg=amg,
        demo=demo,
        export=export,
        models=models,
        info=info,
        doctor=doctor,
    )
    exit_on_error(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="samlight", description="Segment Anything, made light, in JAX."
        )
    )
