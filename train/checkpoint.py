"""A run's checkpoints: Orbax, written in the background, whole or absent, the newest kept.

Beside the state lies what the run is, so that another run's checkpoint is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from samlight_jax.errors import InputError
from train.config import TrainConfig

MAY_DIFFER = (  # between a run and its continuation
    *(
        "out",
        "data",
        "exclude",
        "mesh",
        "cluster",
        "log_every",
        "sheet_every",
        "save_every",
        "keep",
    ),
    *("max_bad", "tensorboard", "cache_photos", "teacher", "init_from", "remat"),
)


def identity(config: TrainConfig, **more: Any) -> dict[str, Any]:
    """What must be equal for a run to continue: the config's fields that matter, and `more`."""
    fields = dataclasses.asdict(config)
    # Through JSON, since that is how it comes back.
    same = {name: value for name, value in fields.items() if name not in MAY_DIFFER}
    return json.loads(json.dumps({**same, **more}))


class Checkpoints:
    """The checkpoints in a run's folder.

    Args:
      folder: of the run.
      identity: of `identity`.
      keep: how many to keep, the newest.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int):
        self.identity = identity
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also raises what it logs
        self.manager = ocp.CheckpointManager(
            (folder / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts to write: the state, and where in the data the run is."""
        if step == self.latest:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(self.identity),
        )
        with self._writing():
            self.manager.save(step, args=args)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes one sentence of what a full disk does, now or to the checkpoint before."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            text = str(error)
            if isinstance(error, ValueError) and "os_error_code" not in text:
                raise
            last = f"the last whole one is of step {self.latest}"
            raise InputError(
                f"A checkpoint in {self.manager.directory} could not be written "
                f"({text.splitlines()[0].rsplit(': ', 1)[-1]}); "
                f"{last if self.latest is not None else 'there is no other'}. Make room; the same "
                "command continues."
            ) from None

    def restore(self, state: Any, where: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, on these devices: (state, data).

        Args:
          state: of shapes and dtypes.
          where: a sharding for each array.

        Raises:
          InputError: it belongs to another run.
        """
        step = self.latest
        path = f"{self.manager.directory}/{step}"
        kinds = ocp.args.Composite(run=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        found: Any = self.manager.restore(step, args=kinds)
        wrong = [
            f"{name} was {found.run.get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if found.run.get(name) != value
        ]
        if wrong:
            raise InputError(
                f"{path} is of another run: {'; '.join(wrong)}. Continue with the same settings, "
                "or give another --out."
            )
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            where,
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        whole: Any = self.manager.restore(step, args=args)
        return whole.state, found.data

    def close(self) -> None:
        """Waits until all is written."""
        with self._writing():
            self.manager.wait_until_finished()
            self.manager.close()
