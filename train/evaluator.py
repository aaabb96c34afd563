"""`Evaluator`: photographs in, scores of every instance out, batch by batch.

While the devices work on a batch, the host loads the next ones and reads the results of the last.
A batch always holds the same photographs in the same places, so results repeat to the bit, whatever
was computed before in the same or another process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp

from samlight_jax.sam import Sam
from train.annotations import Dataset, Photo
from train.detections import Detections
from train.evaluator_batch import Batch, Engine, Record, Spare
from train.evaluator_load import THREADS, Loader, plan
from train.evaluator_mesh import Devices
from train.protocol import Protocol

# Photographs a device, prompts a row, rows at once. A CPU gains nothing from more.
ON_CPU, ELSEWHERE = (1, 2, 1), (16, 8, 8)


class Evaluator:
    """A model (and perhaps a teacher to agree with) under one protocol.

    Args:
      model: to evaluate.
      protocol: how.
      teacher: the model of `protocol.agree_with`, of the same frame.
      detections: of `protocol.detections`.
      devices: to use; None, all.
      batch: photographs a device; None, by the platform.
      masks: return every mask as COCO's RLE too, as the metric "ap" needs them.
    """

    def __init__(
        self,
        model: Sam,
        protocol: Protocol,
        *,
        teacher: Sam | None = None,
        detections: Detections | None = None,
        devices: Sequence[Any] | None = None,
        batch: int | None = None,
        masks: bool = False,
    ):
        self.detections, on = detections, Devices(devices)
        dtype = jnp.dtype(protocol.dtype)
        usual, slots, rows = ON_CPU if on.platform == "cpu" else ELSEWHERE
        self.engine = Engine(
            protocol=protocol,
            config=model.config,
            models=(
                on.put_model(model, dtype),
                None if teacher is None else on.put_model(teacher, dtype),
            ),
            devices=on,
            batch=batch or usual,
            slots=slots,
            rows=rows,
            masks=masks or "ap" in protocol.metric,
        )

    def plan(self, photos: Sequence[Photo]) -> list[list[Photo]]:
        """The batches that `run` takes."""
        return plan(photos, self.engine.batch * self.engine.devices.count)

    def run(self, dataset: Dataset, batches: Sequence[Sequence[Photo]]) -> Iterator[list[Record]]:
        """Records of the batches' photographs, a list a batch, in order."""
        engine = self.engine
        loader = Loader(dataset, engine.protocol, engine.config, engine.slots, self.detections)
        under_way: deque[Batch] = deque()
        spare = Spare()
        with ThreadPoolExecutor(THREADS) as threads, ThreadPoolExecutor(1) as ahead:
            # Made in a thread: a GPU's loop over a number of rows keeps the thread that starts it.
            made = (Batch(engine, loader, threads, spare, each) for each in loader.batches(batches))
            coming = ahead.submit(next, made, None)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(next, made, None)
                batch.dispatch()
                under_way.append(batch)
                if len(under_way) > 1:
                    yield under_way.popleft().records()
            while under_way:
                yield under_way.popleft().records()

    def masks_of(self, dataset: Dataset, photos: Sequence[Photo]) -> dict[tuple[str, str], Record]:
        """The records of photographs' instances by (photo, instance), with their masks."""
        again = Evaluator.__new__(Evaluator)
        again.detections, again.engine = self.detections, self.engine._replace(masks=True)
        return {
            (record["photo"], instance["id"]): instance
            for records in again.run(dataset, again.plan(photos))
            for record in records
            for instance in record["instances"]
        }
