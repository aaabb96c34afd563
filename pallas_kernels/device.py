"""The device that a kernel is chosen for."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What a back end asks about a device.

    Attributes:
      platform: "gpu", "tpu" or "cpu".
      kind: the maker's name, as "NVIDIA H200".
      capability: CUDA's compute capability, as (9, 0); None where there is none.
      interpret: runs GPU kernels in Pallas's interpreters, on the CPU; for tests.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None
    interpret: bool = False


_ASSUMED: contextvars.ContextVar[Device | None] = contextvars.ContextVar("assumed", default=None)


def current() -> Device:
    """The device of `assume`, of `jax.default_device`, or JAX's first, in this order."""
    if (assumed := _ASSUMED.get()) is not None:
        return assumed
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):  # a platform's name
        device = jax.devices(device)[0]
    # ROCm has the attribute too, as "gfx942".
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    capability = (int(numbers[0]), int(numbers[1])) if all(map(str.isdigit, numbers)) else None
    return Device(device.platform, device.device_kind, capability)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Chooses kernels for `device` within: to compile for, or to interpret, what is not here."""
    token = _ASSUMED.set(device)
    try:
        yield
    finally:
        _ASSUMED.reset(token)
