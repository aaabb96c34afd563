"""One batch of the evaluator: filled into arrays of fixed shapes, dispatched, read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools import mask as coco_mask

from samlight_jax.config import SamConfig
from samlight_jax.flat import Flat
from samlight_jax.postprocess import LOW_RES
from train import evaluator_device as device
from train.evaluator_device import Places, Rows, Scores, Settings
from train.evaluator_grid import grid_agreement, grid_record, ratio
from train.evaluator_load import Item, Loaded, Loader, Tokens, weights_of
from train.evaluator_mesh import Devices
from train.metrics import boundary_reach
from train.prompts import corrective_click
from train.protocol import Protocol

CHUNK_PIXELS = 1 << 27  # canvas pixels of the truth masks that one call brings to a device
TOKENS = ("coords", "labels", "valid")

Record = dict[str, Any]  # a photograph's results, as JSON has them


class Engine(NamedTuple):
    """What every batch shares.

    Attributes:
      protocol: how to ask and score.
      config: of the model.
      models: the model and (or None) its teacher, on the devices.
      devices: to spread over.
      batch: photographs a device.
      slots: prompts a row.
      rows: that a device answers at once.
      masks: whether records hold the masks.
    """

    protocol: Protocol
    config: SamConfig
    models: tuple[Flat, Flat | None]
    devices: Devices
    batch: int
    slots: int
    rows: int
    masks: bool


class Spare:
    """Host arrays for the next batch: to touch fresh memory takes longer than to fill it."""

    def __init__(self) -> None:
        self.free: dict[str, list[np.ndarray]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array that holds anything; one of another shape under this name is forgotten."""
        free = self.free.setdefault(name, [])
        while free:
            array = free.pop()
            if (array.shape, array.dtype) == (shape, dtype):
                return array
        return np.zeros(shape, dtype)

    def give(self, name: str, array: np.ndarray) -> None:
        """Takes one back; no device may read it any more."""
        self.free[name].append(array)


class Asked(NamedTuple):
    """An item, its photograph, and where it lies in the rows of all devices."""

    owner: Loaded
    item: Item
    at: tuple[int, int]


class Chunk(NamedTuple):
    """Rows of prompts, on the host and on the devices; `counts`: filled rows of each device."""

    asked: list[Asked]
    host: Rows
    rows: Rows
    counts: Any


class Batch:
    """Brought to the devices when it is made; then `dispatch`; `records` waits for the answers.

    Args:
      engine: the models, the protocol, the devices.
      loader: makes the slots of corrective clicks.
      threads: for the host's work on single items.
      spare: host arrays, given back by `records`.
      loaded: the photographs, at most `engine.batch` a device, of one canvas.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        threads: ThreadPoolExecutor,
        spare: Spare,
        loaded: list[Loaded],
    ):
        self.engine, self.loader, self.threads, self.loaded = engine, loader, threads, loaded
        self.spare, self.taken = spare, []
        self.protocol, self.devices = engine.protocol, engine.devices
        empty = Loaded(loaded[0].photo, loaded[0].canvas)
        self.all = loaded + [empty] * (engine.batch * self.devices.count - len(loaded))
        self.answers: list[tuple[list[Asked], list[Scores]]] = []
        self.similar = self.grid = self.photographs = None
        if not any(one.frame for one in loaded):
            return
        self.photographs = self.devices.put(self._pixels())
        if self.protocol.prompt != "teacher-grid":
            self.places = self.devices.put(self._places())
            self.chunks = self._chunks()
            self.first = next(self.chunks)

    def dispatch(self) -> None:
        """Starts the devices; with corrective clicks it waits for the answers between them."""
        if self.photographs is None:
            return
        models = self.engine.models
        pixels, inputs = self.photographs
        embed = self.devices.compiled(device.embed, dtype=jnp.dtype(self.protocol.dtype))
        embeddings, self.similar = embed(models, pixels, inputs)
        if self.protocol.prompt == "teacher-grid":
            self.grid = self.devices.compiled(grid_agreement)(models, embeddings, inputs)
            return
        for chunk in itertools.chain([self.first], self.chunks):
            self.answers.append((chunk.asked, self._answer(embeddings, chunk)))
            jax.block_until_ready(self.answers[:-2][-1:])  # memory holds few chunks

    def _take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = self.spare.take(name, shape, np.dtype(dtype))
        self.taken.append((name, array))
        return array

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """What lies outside a photograph's `inputs` is not looked at."""
        side = self.engine.config.image_size
        pixels = self._take("pixels", (len(self.all), side, side, 3), np.uint8)
        inputs = np.zeros((len(self.all), 2), np.int32)
        for i, one in enumerate(self.all):
            if one.frame is not None and one.pixels is not None:
                height, width = inputs[i] = one.frame.input
                pixels[i, :height, :width] = one.pixels
                one.pixels = None
        return pixels, inputs

    def _places(self) -> Places:
        (height, width), m = self.all[0].canvas, LOW_RES * self.engine.config.grid
        b = len(self.all)
        places = Places(
            self._take("by_row", (b, height, m), np.float32),
            self._take("by_column", (b, width, m), np.float32),
            np.zeros((b, 2), np.int32),
            np.ones(b, np.int32),
        )
        for i, one in enumerate(self.all):
            if one.frame is not None:
                by_row, by_column = weights_of(one.frame, m)
                for all_, each in ((places.by_row, by_row), (places.by_column, by_column)):
                    all_[i, : len(each)], all_[i, len(each) :] = each, 0
                places.size[i] = one.frame.original
                places.boundary[i] = boundary_reach(one.frame.original)
        return places

    def _chunks(self) -> Iterator[Chunk]:
        """A fixed number of rows a device, as often as it takes."""
        batch, slots, rows = self.engine.batch, self.engine.slots, self.engine.rows
        height, width = self.all[0].canvas
        size = max(1, min(2 * batch, CHUNK_PIXELS // (height * width * slots)) // rows) * rows
        queues = [
            [
                (i, r * slots, part)
                for i in range(batch)
                for r, part in enumerate(self.all[d * batch + i].tokens)
            ]
            for d in range(self.devices.count)
        ]
        for first in range(0, max(map(len, queues)), size):
            chunk = [queue[first : first + size] for queue in queues]
            asked, rows = self._fill(chunk, size)
            counts = np.array(list(map(len, chunk)), np.int32)
            yield Chunk(asked, rows, *self.devices.put((rows, counts)))

    def _fill(
        self, chunk: list[list[tuple[int, int, Tokens]]], size: int
    ) -> tuple[list[Asked], Rows]:
        (height, width), q = self.all[0].canvas, self.engine.slots
        n = next(part for queue in chunk for *_, part in queue).labels.shape[1]
        total = len(chunk) * size
        rows = Rows(
            np.zeros(total, np.int32),
            np.zeros((total, q, n, 2), np.float32),
            np.full((total, q, n), -1, np.int32),
            np.zeros((total, q, n), bool),
            np.zeros((total, q, 4), np.float32),
            np.zeros((total, q, width, height // 8), np.uint8),
        )
        asked = []
        for d, queue in enumerate(chunk):
            for r, (i, start, part) in enumerate(queue, d * size):
                k = len(part.labels)
                rows.image[r] = i
                rows.coords[r, :k], rows.labels[r, :k], rows.valid[r, :k] = part
                owner = self.all[d * self.engine.batch + i]
                for slot, item in enumerate(owner.items[start : start + k]):
                    asked.append(Asked(owner, item, (r, slot)))
                    if item.box is not None:
                        rows.box[r, slot] = item.box
        for each in asked:  # threads would only wait for each other: pycocotools keeps the GIL
            if each.item.rle is not None:
                rows.truth[each.at] = device.pack(coco_mask.decode(each.item.rle), (height, width))
        return asked, rows

    def _answer(self, embeddings: Any, chunk: Chunk) -> list[Scores]:
        """Scores of the prompt, and of each corrective click after it."""
        protocol, masks = self.protocol, self.engine.masks
        rows, scores, low_res = chunk.rows, [], None
        for click in range(protocol.refine + 1):
            more = click < protocol.refine
            select = "single" if click else protocol.mask_select
            boundary = "boundary" in protocol.metric
            settings = Settings(select, self.engine.rows, boundary, masks or more, more)
            call = self.devices.compiled(device.score, settings=settings)
            answer = call(self.engine.models, embeddings, self.places, rows, chunk.counts, low_res)
            low_res = answer.low_res
            if more:
                tokens = self._click(click, chunk, np.asarray(answer.mask))
                rows = rows._replace(**self.devices.put(tokens))
            mask = answer.mask if masks else None
            scores.append(answer._replace(low_res=None, mask=mask))
        return scores

    def _click(self, number: int, chunk: Chunk, masks: np.ndarray) -> dict[str, np.ndarray]:
        """Adds a corrective click to every item that was never perfect; the rows' new slots."""

        def one(each: Asked) -> Tokens:
            owner, item, at = each
            assert owner.frame is not None
            truth = coco_mask.decode(item.rle).astype(bool)
            mask = device.unpack(masks[at], owner.frame.original).astype(bool)
            if item.clicks == number and (click := corrective_click(mask, truth)) is not None:
                x, y, label = click
                item.points.append((float(x), float(y), int(label)))
                item.clicks += 1
            return self.loader.tokens(owner.frame, [item])

        changed = {name: getattr(chunk.host, name).copy() for name in TOKENS}
        for each, tokens in zip(chunk.asked, self.threads.map(one, chunk.asked), strict=True):
            for name in TOKENS:
                changed[name][each.at] = getattr(tokens, name)[0]
        return changed

    def records(self) -> list[Record]:
        """What the devices found, a record a photograph."""
        records = [_record(one) for one in self.loaded]
        by_photo = {one.photo.id: record for one, record in zip(self.loaded, records, strict=True)}
        present = [i for i, one in enumerate(self.loaded) if one.frame is not None]
        if self.similar is not None:
            similar = np.asarray(self.similar, np.float64)
            for i in present:
                records[i]["embedding"] = dict(zip(("mse", "cosine"), similar[i].tolist()))  # noqa: B905
        if self.grid is not None:
            grid = jax.tree.map(np.asarray, self.grid)
            for i in present:
                one, frame = jax.tree.map(lambda x, i=i: x[i], grid), self.loaded[i].frame
                assert frame is not None
                records[i]["instances"] = grid_record(one, frame, self.engine.masks)
        for asked, answers in self.answers:
            host = jax.tree.map(np.asarray, answers)
            found = self.threads.map(lambda each, host=host: _instance(each, host), asked)
            for each, instance in zip(asked, found, strict=True):
                by_photo[each.owner.photo.id]["instances"].append(instance)
        while self.taken:
            self.spare.give(*self.taken.pop())
        return records


def _record(one: Loaded) -> Record:
    return {
        "photo": one.photo.id,
        "name": one.photo.name,
        "problems": [{"what": each.what, "why": each.why} for each in one.problems],
        "instances": [],
    }


def _instance(asked: Asked, answers: list[Scores]) -> Record:
    """The record of one item; a mask that became perfect gets no more clicks and is kept."""
    owner, item, at = asked
    source, last = item.source, answers[item.clicks]
    record: Record = {
        "id": source.id,
        "category": source.category,
        "box": None if item.box is None else [round(float(x), 3) for x in item.box],
        "points": [list(point) for point in item.points],
        "predicted_iou": round(float(last.iou[at]), 6),
        "mask": int(last.choice[at]),
    }
    if item.rle is None:
        record["score"] = source.score  # type: ignore[union-attr]
    else:
        record["area"] = source.area  # type: ignore[union-attr]
        record["iou"] = ratio(last.overlap[at])
        if len(answers) > 1:
            record["rounds"] = [
                ratio(answers[min(k, item.clicks)].overlap[at]) for k in range(len(answers))
            ]
        if last.boundary is not None:
            record["boundary"] = ratio(last.boundary[at])
    if last.agreement is not None:
        record["agreement"] = ratio(last.agreement[at])
    if last.mask is not None and owner.frame is not None:
        mask = device.unpack(last.mask[at], owner.frame.original)
        rle: Any = coco_mask.encode(np.asfortranarray(mask))
        record["rle"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return record
