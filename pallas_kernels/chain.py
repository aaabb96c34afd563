"""Which back end runs a call: each is asked in order, none is tried and caught.

A back end is a module with `NAME`, `unsupported(...)` and `run(...)`. The last two take the same
arguments; `unsupported` returns None, or one sentence that says why `run` would not do.
"""

from typing import Any

from pallas_kernels.dilated_attention import (
    cudnn,
    jax_triton,
    mosaic_gpu,
    reference,
    triton,
    xla,
)

CHAIN: dict[str, Any] = {  # best first
    i.NAME: i for i in (mosaic_gpu, triton, jax_triton, cudnn, xla, reference)
}


class Unsupported(NotImplementedError):
    """No back end takes this call, or the named one does not."""


def explain(*args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Why each back end would not run a call, best first; None where it would.

    Args:
      *args: handed to the back ends; shapes and dtypes will do for arrays.
      **kwargs: handed to the back ends.
    """
    return {name: backend.unsupported(*args, **kwargs) for name, backend in CHAIN.items()}


def run(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the first back end that takes the call.

    Args:
      implementation: the name of the one back end to ask; None asks each in order.
      *args: handed to the back end.
      **kwargs: handed to the back end.

    Returns:
      What the back end's `run` returns.

    Raises:
      ValueError: `implementation` is no back end's name.
      Unsupported: every back end asked has refused; the message holds their reasons.
    """
    if implementation is not None and implementation not in CHAIN:
        known = ", ".join(repr(name) for name in CHAIN)
        raise ValueError(
            f"implementation={implementation!r} is unknown; pass one of {known}, "
            "or None for the first that takes the call."
        )
    refusals = []
    for name in CHAIN if implementation is None else [implementation]:
        # Asked, not caught: under jit, errors come after a `try` has ended, and a caught bug
        # would become a slow path that nobody notices.
        reason = CHAIN[name].unsupported(*args, **kwargs)
        if reason is None:
            return CHAIN[name].run(*args, **kwargs)
        refusals.append(f"{name}: {reason}")
    raise Unsupported("No dilated attention for this call:\n  " + "\n  ".join(refusals))
