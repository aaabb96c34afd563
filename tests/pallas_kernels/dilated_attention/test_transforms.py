"""What `run_of` adds to two kernels; these count their calls and compute as the reference does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dilated_attention import groups, reference, transforms

GRID = groups.fit((6, 5), (4, 4), (2, 2))
OPTIONS = {"grid": GRID, "scale": 0.5}
Q = jax.random.normal(jax.random.key(0), (3, 6, 5, 4, 16))


@pytest.fixture
def calls():
    return []


@pytest.fixture
def run(calls):
    def forward(call, qkv, rel):
        calls.append(("forward", qkv[0].shape[0]))
        out, lse = reference.run(qkv, rel, grid=call.grid, offsets=call.offsets, scale=call.scale)
        return out, transforms._grouped(lse, call)

    def backward(call, qkv, rel, out, lse, dout, dlse):
        calls.append(("backward", qkv[0].shape[0]))
        _, pull_back = jax.vjp(lambda *x: forward(call, *x), qkv, rel)
        return pull_back((dout, jnp.where(jnp.isinf(lse), 0.0, dlse)))

    return transforms.run_of(forward, backward)


@pytest.mark.parametrize("offsets", ["all", "per_head"])
def test_run_is_the_reference(run, offsets):
    got = run((Q, Q, Q), (), offsets=offsets, **OPTIONS)
    want = reference.run((Q, Q, Q), (), offsets=offsets, **OPTIONS)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_gradient_is_the_backward_kernel(run, calls):
    def loss(attend, q):
        out, lse = attend((q, q, q), (), offsets="all", **OPTIONS)
        return (out**2).sum() + lse.sum()

    got = jax.grad(lambda q: loss(run, q))(Q)
    assert "backward" in dict(calls)
    np.testing.assert_allclose(got, jax.grad(lambda q: loss(reference.run, q))(Q), atol=1e-4)


def test_mapped_axis_joins_the_batch(run, calls):
    many = jnp.stack([Q, Q + 1])
    got, _ = jax.vmap(lambda q: run((q, Q, Q), (), offsets="all", **OPTIONS))(many)
    assert ("forward", 6) in calls
    for i in range(2):
        want, _ = reference.run((many[i], Q, Q), (), offsets="all", **OPTIONS)
        np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_a_second_call_outside_of_jit_compiles_nothing(run, calls):
    run((Q, Q, Q), (), offsets="all", **OPTIONS)
    traced = len(calls)
    run((Q + 1, Q, Q), (), offsets="all", **OPTIONS)
    assert len(calls) == traced
