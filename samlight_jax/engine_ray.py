"""`--engine ray`: `samlight amg` and `predict` over more photographs than one machine holds.

Ray Data hands parts (`engine_ray_parts`) to a pool of workers (`engine_ray_work`), one for each GPU
or CPU, each with a model of its own. A part that a dying worker held goes to another; one that is
finished has a record and is never done again. This process only lists, plans and counts, and leaves
the GPUs alone. It uses the cluster of RAY_ADDRESS, or this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import track

from samlight_jax import automatic_mask_generator_runs as runs
from samlight_jax import engine_ray_parts as parts
from samlight_jax import weights
from samlight_jax.build_sam import find
from samlight_jax.engine_ray_parts import Output, Part
from samlight_jax.engine_ray_work import Form, Task, Worker
from samlight_jax.errors import InputError

PHOTOS = 256  # of a folder in a part
BLOCKS = 64  # a worker: what Ray Data hands out at a time, parts where there are few
SHOWN = 20  # skipped photographs on the screen; the records name all


@dataclasses.dataclass(frozen=True)
class Engine:
    """For more photographs than one machine holds.

    Attributes:
      engine: ray: folders with all in them, tars, patterns and URLs such as s3://bucket/photos go
        to a Ray cluster (RAY_ADDRESS, or this machine) and become one file a part in --output.
      workers: models at work; one for each GPU, or without any for each CPU.
      photos_per_part: of a folder, 256 unless said; a tar is a part.
    """

    engine: Annotated[str | None, tyro.conf.arg(metavar="ray")] = None
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    photos_per_part: Annotated[int | None, tyro.conf.arg(metavar="N")] = None

    def chosen(self) -> bool:
        """Whether there is one.

        Raises:
          InputError: an unknown one, or numbers that make no sense.
        """
        if self.engine not in (None, "ray"):
            raise InputError(f"--engine {self.engine}: expected ray, or none for this process.")
        for flag, value in (("workers", self.workers), ("photos-per-part", self.photos_per_part)):
            if value is not None and self.engine is None:
                raise InputError(f"--{flag} needs --engine ray.")
            if value is not None and value < 1:
                raise InputError(f"--{flag} {value}: expected 1 or more.")
        return self.engine is not None


NO_ENGINE = Engine()


def run(
    engine: Engine,
    command: str,
    task: Task,
    inputs: Sequence[str],
    output: str,
    form: Form,
    model: str,
) -> None:
    """Does what of a job is not finished.

    Args:
      engine: see there.
      command: noted in the output, with the task, so that no other job is mixed into it.
      task: a frozen dataclass.
      inputs: paths, patterns or URLs.
      output: a path or URL of a folder.
      form: of the files of masks.
      model: a model file or a name.

    Raises:
      InputError, OSError: nothing, or nothing more, could be done.
      SystemExit: with 1, some of it could not.
    """
    ray = _library()
    if form == "parquet":
        runs.library("pycocotools.mask", "--format parquet")
    folders, tars = parts.found(inputs)
    arrays, config, _ = weights.read(find(model))
    place = Output.of(output)
    settings = {"command": command, "format": form, "inputs": [_absolute(url) for url in inputs]}
    settings |= {"model": weights.fingerprint(config, arrays), **dataclasses.asdict(task)}
    with _cluster(ray):  # starts processes, which JAX does not like to see once it runs
        size, resources = pool(ray.cluster_resources(), engine.workers)
        jax.config.update("jax_platforms", "cpu")  # the GPUs are the workers'
        task.build(weights.build(config, arrays))  # what is wrong with it shows here
        parts.settle(place, settings)
        place.sweep()
        planned = parts.planned(place, folders, tars, engine.photos_per_part or PHOTOS)
        todo = parts.unfinished(place, planned)
        threads = None if "num_gpus" in resources else resources["num_cpus"]
        made = (config, arrays, task, place, form, threads, uuid.uuid4().hex)
        records = _records(ray, todo, made, min(size, len(todo)), resources) if todo else ()
        _report(todo, len(planned), records, place)
    place.sweep()


def pool(resources: dict[str, float], workers: int | None) -> tuple[int, dict[str, int]]:
    """How many workers a cluster of these resources gets, and what each of them holds.

    Raises:
      InputError: more than there is room for; Ray would wait for ever.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    kind, room = ("GPUs", gpus) if gpus else ("CPUs", cpus)
    if (workers or 1) > room:
        raise InputError(f"--workers {workers or 1}: the Ray cluster has {room} {kind}.")
    size = workers or room
    return size, {"num_gpus": 1} if gpus else {"num_cpus": cpus // size}


def _library() -> Any:
    try:
        importlib.import_module("ray.data")
    except ImportError:
        raise InputError(
            "--engine ray needs Ray, which is not installed; pip install 'samlight-jax[ray]'."
        ) from None
    return importlib.import_module("ray")


def _absolute(url: str) -> str:
    fs, path = parts.reach(url)
    return fs.unstrip_protocol(path)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """The cluster that this process is connected to, or else one until the work is done."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _records(
    ray: Any, todo: Sequence[Part], made: tuple, size: int, resources: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The records of the parts, as they are finished."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"part": part.to_json()} for part in todo]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), size * BLOCKS))
    data = data.map_batches(
        Worker,
        fn_constructor_args=made,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        **resources,
    )
    try:
        for row in data.iter_rows():
            yield json.loads(row["record"])
    except ray.exceptions.RayTaskError:
        raise  # a mistake of ours, or too little memory: its trace tells
    except ray.exceptions.RayError as error:
        raise InputError(
            f"Ray gave up ({str(error).splitlines()[0]}); finished parts are kept, and the same "
            "command goes on, with fewer --workers if memory ran out."
        ) from error


def _report(
    todo: Sequence[Part], planned: int, records: Iterable[dict[str, Any]], output: Output
) -> None:
    """Shows what comes in, and ends the program with the code that it deserves."""
    console = Console(stderr=True)
    left = {part.name: "Ray lost it" for part in todo}
    photographs = masks = skipped = 0
    for record in track(records, "segmenting", total=len(todo), console=console):
        if "error" in record:
            left[record["part"]] = record["error"]
            continue
        del left[record["part"]]
        photographs += record["photographs"]
        masks += record["masks"]
        for one in record["skipped"]:
            skipped += 1
            if skipped <= SHOWN:
                line = f"skipped: {one['file_name']} of {record['part']}: {one['reason']}"
                console.print(line, markup=False, soft_wrap=True)
    print(
        f"{planned} parts, {planned - len(todo)} of them finished before; now {photographs} "
        f"photographs with {masks} masks, {skipped} skipped."
    )
    if left:
        name, why = next(iter(left.items()))
        sentence = f"{len(left)} parts are not finished, {name} because: {why}"
        raise InputError(f"{sentence} The same command goes on.")
    if skipped and not photographs:
        raise InputError(
            f"None of the {skipped} photographs could be used; the lines above say why."
        )
    if skipped:
        where = f"{output.url}/{parts.RECORDS}"
        print(f"{skipped} photographs were skipped; {where} names them.", file=sys.stderr)
        raise SystemExit(1)
