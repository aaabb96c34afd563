import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.dilated_attention import reference, xla
from pallas_kernels.dilated_attention.transforms import Call
from tests.pallas_kernels.dilated_attention.cases import SMALL, Case
from tests.pallas_kernels.dilated_attention.suite import Suite


class TestXla(Suite):
    name = "xla"
    must_take = tuple(SMALL)


@pytest.mark.parametrize("offsets", ["all", "per_head"])
@pytest.mark.parametrize("most", [1, 50, 150, 300])  # of 20 tokens a group: rows, parts, groups
def test_steps_of_any_size_add_up(monkeypatch, most, offsets):
    monkeypatch.setattr(xla, "STEP_ON_CPU", most)
    case = Case(size=(7, 10), segment=(8, 10), dilation=(2, 2), rel="float32", offsets=offsets)
    qkv, rel = case.draw()
    (want, lse), pull_back = jax.vjp(lambda *x: reference.run(*x, **case.static), qkv, rel)
    dout, dlse = jnp.cos(want), jnp.where(lse == -jnp.inf, 0.0, jnp.sin(lse))

    call = Call(case.grid, offsets, case.static["scale"], device.current())
    out, grouped = xla._forward(call, qkv, rel)
    np.testing.assert_allclose(out, want, atol=1e-5)
    got = xla._backward(call, qkv, rel, out, grouped, dout, group(dlse, call))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(pull_back((dout, dlse))), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def group(x, call):
    x = xla.groups.group(x[..., None], call.grid)
    return (xla.groups.take_own(x) if call.own else x)[..., 0]


def test_memory_is_bounded():
    """A whole map of 4096 tokens: its scores would take 64 MiB a head."""
    q = jax.ShapeDtypeStruct((1, 64, 64, 2, 32), jnp.float32)
    case = Case(size=(64, 64), segment=(64, 64), dilation=(1, 1))
    run = jax.jit(lambda *qkv: xla.run(qkv, (), **case.static))
    assert run.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes < 2**24
