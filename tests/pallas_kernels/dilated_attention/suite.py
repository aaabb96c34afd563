"""What every back end is held to: `class TestXla(Suite): name = "xla"` runs it all.

A call that the back end refuses is skipped with the refusal's sentence.
"""

import dataclasses
import functools
import importlib
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels.device import Device, assume
from tests.pallas_kernels.conftest import on_four_devices
from tests.pallas_kernels.dilated_attention import oracle, sharding
from tests.pallas_kernels.dilated_attention.cases import SMALL, Case
from tests.pallas_kernels.dilated_attention.exactness import QUICK, assert_as_exact, results

ROOT = Path(__file__).resolve().parents[3]
HALF = Case(size=(8, 8), segment=(8, 8), dilation=(2, 2), dtype="bfloat16", head_dim=64)
ATOL = 2e-2  # two bfloat16 roundings of numbers below 4


def jitted(function):
    return jax.jit(function, compiler_options=QUICK)


def assert_equal(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(got, want, atol=ATOL):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(a).astype(float) for a in (x, y))
        np.testing.assert_allclose(x, y, atol=atol, rtol=atol)


def poison():
    """Leaves NaN in the memory that the next call may be given."""
    for power in range(8, 22):
        jax.block_until_ready([jnp.full(2**power, jnp.nan) for _ in range(4)])


@st.composite
def patterns(draw):
    """Sizes, segments and dilations that need not fit one another."""
    dilation = [draw(st.integers(1, 3)) for _ in range(2)]
    segment = [r * draw(st.integers(1, 5)) for r in dilation]
    size = [draw(st.integers(1, 12)) for _ in range(2)]
    return Case(
        size=(size[0], size[1]),
        segment=(segment[0], segment[1]),
        dilation=(dilation[0], dilation[1]),
        offsets=draw(st.sampled_from(["all", "per_head"])),
        rel=draw(st.sampled_from([None, "float32"])),
        packed=draw(st.booleans()),
        heads=draw(st.integers(1, 4)),
        head_dim=64,
    )


class Suite:
    """The tests; a subclass names its back end, and the device where it is not the real one.

    Attributes:
      name: the back end, a module of `pallas_kernels.dilated_attention`.
      device: the device to assume; None for the real one.
      cases: the calls, by name.
      must_take: names of those that it may not refuse.
    """

    name: str
    device: Device | None = None
    cases: dict[str, Case] = SMALL
    must_take: tuple[str, ...] = ()

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases)

    @pytest.fixture(autouse=True)
    def assumed(self):
        if self.device is None:
            yield
        else:
            with assume(self.device):
                yield

    @property
    def backend(self):
        return importlib.import_module(f"pallas_kernels.dilated_attention.{self.name}")

    def refusal(self, case):
        reason = self.backend.unsupported(*case.draw(), **case.static)
        if reason is not None:
            assert reason.endswith("."), reason
            assert ". " not in reason, reason  # one sentence
        return reason

    def take(self, case):
        """The call's `run` of arrays alone, and these, unless the back end refuses it."""
        if (reason := self.refusal(case)) is not None:
            pytest.skip(f"{self.name}: {reason}")
        return functools.partial(self.backend.run, **case.static), *case.draw()

    def results(self, case, qkv, rel, cotangents=None):
        """Output, log-sum-exp and all gradients, compiled."""
        cotangents = case.draw_cotangents() if cotangents is None else cotangents
        return results(self.backend.run, qkv, rel, cotangents, device=self.device, **case.static)

    # What is computed.

    def test_is_as_exact_as_plain_attention(self, case):
        must, case = case in self.must_take, self.cases[case]
        with jax.enable_x64(case.dtype == "float64"):
            if must:
                assert self.refusal(case) is None
            _, *arrays = self.take(case)
            got = self.results(case, *arrays)
        assert_as_exact(got, case)

    def test_any_pattern_is_the_definition(self):
        reasons = []

        @hypothesis.settings(max_examples=6, derandomize=True, database=None)
        @hypothesis.given(patterns())
        def check(case):
            if reason := self.refusal(case):
                reasons.append(reason)
                return
            reasons.append(None)
            qkv, rel = case.draw()
            separate = [np.asarray(qkv[0])[:, :, :, i] for i in range(3)] if case.packed else qkv
            want = oracle.attend(
                *(np.asarray(x[0], np.float64) for x in separate),
                case.segment,
                case.dilation,
                case.offsets,
                case.static["scale"],
                *(np.asarray(x[0], np.float64) for x in rel),
            )
            run = jitted(functools.partial(self.backend.run, **case.static))
            for x, y in zip(run(qkv, rel), want, strict=True):
                np.testing.assert_allclose(x[0], y, atol=2e-5, rtol=2e-5)

        check()
        if None not in reasons:
            pytest.skip(f"{self.name}: {reasons[0]}")

    def test_gradients_are_finite_differences(self):
        """Independent of any other back end, and through output and log-sum-exp at once."""
        case = Case(size=(5, 7), segment=(4, 8), dilation=(2, 2), rel="float32", heads=1)
        run, qkv, rel = self.take(case)
        jax.test_util.check_grads(
            jax.jit(run), (qkv, rel), order=1, modes=("rev",), eps=1e-2, rtol=1e-2, atol=1e-2
        )

    def test_large_scores_stay_finite(self):
        run, (q, k, v), _ = self.take(dataclasses.replace(HALF, dilation=(1, 1)))
        got = jitted(run)((q * 100, k * 100, v), ())
        assert all(np.isfinite(np.asarray(x).astype(float)).all() for x in got)
        assert (got[1] > 88).any()  # where exp alone would overflow float32

    # Bits.

    @pytest.mark.parametrize("name", ["window_batch", "grid_rel", "ragged_empty", "own_plane"])
    def test_runs_repeat_bit_for_bit_in_poisoned_memory(self, name):
        _, *arrays = self.take(SMALL[name])
        want = self.results(SMALL[name], *arrays)
        for _ in range(3):
            poison()
            assert_equal(self.results(SMALL[name], *arrays), want)

    def test_without_gradients_the_bits_are_the_same(self):
        run, *arrays = self.take(SMALL["grid_rel"])
        assert_equal(jitted(run)(*arrays), self.results(SMALL["grid_rel"], *arrays)[:2])

    # What is not to be seen.

    def test_query_that_sees_no_key_is_zero(self):
        case = dataclasses.replace(HALF, rel="float32")
        _, qkv, (rel_h, rel_w) = self.take(case)
        rel_h = rel_h.at[0, 1, 2, 0].set(-jnp.inf)
        rel_w = rel_w.at[0, 3, 3, 1, 0].set(-jnp.inf)  # another sees all but a column
        out, lse, dq, dk, dv, *drel = self.results(case, qkv, (rel_h, rel_w))
        assert (out[0, 1, 2, 0] == 0).all()
        assert (dq[0, 1, 2, 0] == 0).all()
        assert [tuple(i) for i in np.argwhere(np.isneginf(lse))] == [(0, 1, 2, 0)]
        for x in (out, dq, dk, dv, *drel):
            assert np.isfinite(np.asarray(x).astype(float)).all()

    @pytest.mark.parametrize("size", [(16, 16), (13, 11)], ids=["whole", "ragged"])
    def test_nan_stays_in_its_group(self, size):
        case = dataclasses.replace(HALF, size=size, dtype="bfloat16")
        _, qkv, rel = self.take(case)
        inside = np.zeros((1, *size, 1, 1), bool)
        inside[:, 8:16:2, 1:8:2] = True  # residue (0, 1) of the lower left segment
        poisoned = tuple(jnp.where(inside, jnp.nan, x).astype(x.dtype) for x in qkv)
        everywhere = np.broadcast_to(inside[..., 0], (1, *size, case.heads))
        clean, got = self.results(case, qkv, rel), self.results(case, poisoned, rel)
        assert np.isnan(np.asarray(got[0])[everywhere].astype(float)).all()
        assert_equal(*([np.asarray(x)[~everywhere] for x in results] for results in (got, clean)))

    def test_nan_where_a_head_does_not_attend_is_not_seen(self):
        case = dataclasses.replace(HALF, size=(1, 64), segment=(1, 64), offsets="per_head")
        case = dataclasses.replace(case, dilation=(1, 2))
        _, qkv, rel = self.take(case)
        foreign = np.zeros((1, 1, 64, 2, 1), bool)
        foreign[:, :, 1::2, 0] = foreign[:, :, ::2, 1] = True
        poisoned = tuple(jnp.where(foreign, jnp.nan, x).astype(x.dtype) for x in qkv)
        assert_equal(self.results(case, poisoned, rel), self.results(case, qkv, rel))

    # JAX's transformations.

    def loss(self, case):
        """A function of q, k and v, and three images of these."""
        run, _, _ = self.take(case)
        three = [jnp.stack([case.draw(seed)[0][i] for seed in range(3)]) for i in range(3)]

        def loss(q, k, v):
            out, lse = run((q, k, v), ())
            return (out.astype(jnp.float32) ** 2).sum() + jnp.sin(lse).sum()

        return loss, three

    def test_vmap_of_values_and_gradients(self):
        """Of some of the operands and along any axis; the gradient of a map is a map's."""
        loss, (q, k, v) = self.loss(HALF)
        both = jax.value_and_grad(loss, (0, 1, 2))
        one_by_one = jitted(lambda *qkv: jax.lax.map(lambda x: both(*x), qkv))
        assert_close(jitted(jax.vmap(both))(q, k, v), one_by_one(q, k, v))
        across = jax.vmap(both, in_axes=(1, None, 0))
        shared = jnp.broadcast_to(k[:1], k.shape)
        got = jitted(across)(jnp.moveaxis(q, 0, 1), k[0], v)
        assert_close(got, one_by_one(q, shared, v))
        outside = jax.grad(lambda *qkv: jax.vmap(loss, (1, None, 0))(*qkv).sum(), (0, 1, 2))
        dq, dk, dv = jitted(outside)(jnp.moveaxis(q, 0, 1), k[0], v)
        # Of the shared keys the three gradients add up.
        want = (jnp.moveaxis(got[1][0], 0, 1), got[1][1].astype(jnp.float32).sum(0), got[1][2])
        assert_close((dq, dk, dv), want, atol=2 * ATOL)

    def test_without_jit(self):
        run, *arrays = self.take(HALF)
        assert_close(run(*arrays), jitted(run)(*arrays))

    def test_checkpoint_leaves_the_gradient(self):
        loss, (q, k, v) = self.loss(HALF)
        want = jitted(jax.grad(loss, (0, 1, 2)))(q[0], k[0], v[0])
        got = jitted(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(q[0], k[0], v[0])
        assert_close(got, want)

    def test_batch_and_heads_divide_among_devices_without_messages(self):
        self.take(sharding.CASES[0])
        if self.device is None and jax.default_backend() != "cpu":
            if jax.device_count() == 1:
                pytest.skip("needs several GPUs.")
            sharding.check(self.name, None)
            return
        on_four_devices(
            f"from {sharding.__name__} import Device, check; check({self.name!r}, {self.device!r})"
        )
