"""A worker of `--engine ray`: one model, and a part's photographs in, its file and record out.

Parquet has a row for each photograph, its masks as a list of structs with COCO's compressed run
lengths. COCO JSON has uncompressed ones, and ids that count from 1 in each part.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from samlight_jax import automatic_mask_generator_runs as runs
from samlight_jax import weights
from samlight_jax.build_sam import keep_compilations
from samlight_jax.config import SamConfig
from samlight_jax.engine_ray_parts import PARTS, RECORDS, TRIES, Output, Part, photographs
from samlight_jax.errors import InputError
from samlight_jax.preprocess import as_array
from samlight_jax.sam import Sam

Form = Literal["parquet", "coco"]
SUFFIX = {"parquet": "parquet", "coco": "json"}
COMPRESSION = "zstd"
DEATHS = 3  # of workers over one part in one run, before the part is left alone

Masks = list[dict[str, Any]]


class Task(Protocol):
    """What is made of each photograph: a frozen dataclass, which travels to the workers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, model: Sam) -> Callable[[np.ndarray], Masks]:
        """What turns (height, width, 3) uint8 into COCO annotations without ids.

        Raises:
          InputError: the task makes no sense, whatever the photograph.
        """
        ...


class Worker:
    """Does parts; Ray Data starts one for each GPU or CPU and hands it batches of one part."""

    def __init__(
        self,
        config: SamConfig,
        arrays: Mapping[str, np.ndarray],
        task: Task,
        output: Output,
        form: Form,
        threads: int | None,
        run: str,
    ):
        if threads:
            os.environ["NPROC"] = str(threads)  # XLA reads it when the first array is made
        keep_compilations()
        # Ray hands out arrays that cannot be written to, which JAX need not copy either.
        self._masks_of = task.build(weights.build(config, arrays))
        self._output = output
        self._form: Form = form
        self._run = run

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """A column of parts to a column of their records; one with an `error` is not finished."""
        records = [self._record(Part.from_json(text)) for text in batch["part"]]
        return {"record": [json.dumps(record) for record in records]}

    def _record(self, part: Part) -> dict[str, Any]:
        name = f"{RECORDS}/{part.name}.json"
        try:
            if text := self._output.read(name):  # finished by a worker that died before it said so
                return json.loads(text)
            self._begin(part)
            with tempfile.TemporaryDirectory(prefix="samlight-") as scratch:
                table, record = self._do(part, Path(scratch))
            self._output.write(f"{PARTS}/{part.name}.{SUFFIX[self._form]}", table.finish())
            self._output.write(name, json.dumps(record).encode())
            self._output.remove(f"{TRIES}/{part.name}")
            return record
        except OSError as error:  # a store out of reach, a full disk: the next run does it again
            return {"part": part.name, "error": str(error)}

    def _begin(self, part: Part) -> None:
        """Notes the try: Ray would hand a part that kills its workers out for ever."""
        name = f"{TRIES}/{part.name}"
        run, _, count = (self._output.read(name) or b"").decode().partition(" ")
        tries = int(count) if run == self._run else 0
        if tries == DEATHS:
            raise OSError(f"{tries} workers died over it; did they have too little memory?")
        self._output.write(name, f"{self._run} {tries + 1}".encode())

    def _do(self, part: Part, scratch: Path) -> tuple[Table, dict[str, Any]]:
        table = TABLES[self._form](part)
        skipped, warned, masks, start = [], [], 0, time.perf_counter()
        for name, file in photographs(part):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    image = _image(name, file, scratch)
                    found = self._masks_of(image)
                except InputError as error:
                    skipped.append({"file_name": name, "reason": str(error)})
                    continue
            warned += [{"file_name": name, "warning": str(w.message)} for w in caught]
            table.add(name, image.shape[:2], found)
            masks += len(found)
        return table, {
            "part": part.name,
            "source": part.source,
            "photographs": table.photographs,
            "masks": masks,
            "skipped": skipped,
            "warnings": warned,
            "seconds": round(time.perf_counter() - start, 3),
        }


def _image(name: str, file: Path | bytes | InputError, scratch: Path) -> np.ndarray:
    """What `photographs` gave, read; bytes by way of a file, so that all are read alike."""
    if isinstance(file, InputError):
        raise file
    if isinstance(file, Path):
        return np.asarray(as_array(file))
    path = scratch / f"photo{Path(name).suffix}"
    path.write_bytes(file)
    try:
        return np.asarray(as_array(path))
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None


class Table(Protocol):
    """A part's file in the making."""

    photographs: int

    def add(self, name: str, size: tuple[int, ...], masks: Masks) -> None:
        """One photograph more, of this height and width."""
        ...

    def finish(self) -> bytes:
        """The file."""
        ...


class Coco:
    """COCO JSON; `info` names the source."""

    def __init__(self, part: Part):
        self.photographs = 0
        self._info = {"source": part.source}
        self._images: list[str] = []
        self._annotations: list[str] = []

    def add(self, name: str, size: tuple[int, ...], masks: Masks) -> None:
        """See `Table`."""
        self.photographs += 1
        image = {"file_name": name, "height": size[0], "width": size[1]}
        self._images.append(json.dumps({"id": self.photographs, **image}))
        for mask in masks:
            ids = {"id": len(self._annotations) + 1, "image_id": self.photographs}
            self._annotations.append(json.dumps({**ids, **mask}))

    def finish(self) -> bytes:
        """See `Table`."""
        categories = '[{"id": 1, "name": "object"}]'
        head = f'{{"info": {json.dumps(self._info)},\n"categories": {categories},\n"images": ['
        middle = '],\n"annotations": ['
        lines = head, ",\n".join(self._images), middle, ",\n".join(self._annotations), "]}\n"
        return "".join(lines).encode()


class Parquet:
    """Parquet: source, file_name, height, width, masks."""

    def __init__(self, part: Part):
        self.photographs = 0
        self._source = part.source
        self._rows: list[dict[str, Any]] = []

    def add(self, name: str, size: tuple[int, ...], masks: Masks) -> None:
        """See `Table`."""
        self.photographs += 1
        row = {"source": self._source, "file_name": name, "height": size[0], "width": size[1]}
        row["masks"] = [self._compact(mask) for mask in masks]
        self._rows.append(row)

    def _compact(self, mask: dict[str, Any]) -> dict[str, Any]:
        rle = mask["segmentation"]
        return {**mask, "segmentation": runs.compressed(np.array(rle["counts"]), rle["size"])}

    def finish(self) -> bytes:
        """See `Table`."""
        pa = importlib.import_module("pyarrow")
        file = io.BytesIO()
        table = pa.Table.from_pylist(self._rows, schema=_schema(pa))
        importlib.import_module("pyarrow.parquet").write_table(table, file, compression=COMPRESSION)
        return file.getvalue()


TABLES: dict[Form, Callable[[Part], Table]] = {"parquet": Parquet, "coco": Coco}


def _schema(pa: Any) -> Any:
    """The same for every part and both commands, even where there is no mask."""
    numbers = pa.list_(pa.float64())
    mask = {
        "segmentation": pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()}),
        "area": pa.int64(),
        "bbox": numbers,
        "predicted_iou": pa.float64(),
        "stability_score": pa.float64(),
        "point_coords": pa.list_(numbers),
        "crop_box": numbers,
    }
    columns = {"source": pa.string(), "file_name": pa.string()}
    columns |= {"height": pa.int32(), "width": pa.int32()}
    return pa.schema({**columns, "masks": pa.list_(pa.struct(mask))})
