"""How a kernel cuts its work: tiles tuned on a device, by a call's key, or None.

`python -m pallas_kernels.autotune` writes tuned/<device>.json; a back end asks here first,
and falls back on a heuristic of its own for devices and keys that nobody has tuned.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

TUNED = Path(__file__).parent / "tuned"
_USED: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("used", default={})  # noqa: B039


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel.

    Attributes:
      block_q: queries held at a time.
      block_k: keys held at a time.
      num_warps: of one program; 32 threads each.
      num_stages: depth of the software pipeline that loads the tiles.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def path(kind: str) -> Path:
    """The file of a device, as "NVIDIA H200"."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


@functools.cache
def _entries(kind: str) -> dict[str, Any]:
    file = path(kind)
    return json.loads(file.read_text())["entries"] if file.exists() else {}


def lookup(kind: str, implementation: str, kernel: str, key: str) -> dict[str, Any] | None:
    """The tuned configuration's fields, or None.

    Args:
      kind: the device's, as "NVIDIA H200".
      implementation: a back end's name.
      kernel: "forward", "dq" or "dkv".
      key: what the tiles depend on, as `key` writes it.
    """
    if (used := _USED.get().get(f"{implementation}/{kernel}")) is not None:
        return used
    entry = _entries(kind).get(name(implementation, kernel, key))
    return entry and entry.get("config")


def name(implementation: str, kernel: str, key: str) -> str:
    """Of an entry in tuned/<device>.json."""
    return f"{implementation}/{kernel}/{key}"


def key(cut: Any) -> str:
    """What the best tiles depend on.

    Args:
      cut: a kernel's view of a call, with its `call`, `head_dim`, `dtype` and `rel`.
    """
    rows, columns = cut.call.grid.group
    rel = "_rel" if cut.rel else ""
    return f"{jnp.dtype(cut.dtype).name}_d{cut.head_dim}_{rows}x{columns}{rel}"


def choose(
    implementation: str, kernel: str, cut: Any, candidates: Callable[[str, Any], list[Tiles]]
) -> Tiles:
    """Tuned tiles of the device, or the heuristic's.

    Args:
      implementation: a back end's name.
      kernel: "forward", "dq" or "dkv".
      cut: as in `key`.
      candidates: `(kernel, cut) ->` tiles, the heuristic's choice first.
    """
    tuned = lookup(cut.call.device.kind, implementation, kernel, key(cut))
    return Tiles(**tuned) if tuned else candidates(kernel, cut)[0]


@contextlib.contextmanager
def use(implementation: str, kernel: str, config: dict[str, Any]) -> Iterator[None]:
    """Makes `lookup` find `config` within, whatever the key; for tuning."""
    token = _USED.set(_USED.get() | {f"{implementation}/{kernel}": config})
    try:
        yield
    finally:
        _USED.reset(token)
