import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dilated_attention, dilated_attention_qkvpacked

FORMS = {  # sizes, options
    "row": ((11,), {"segment": 8, "dilation": 4}),
    "plane": (
        (7, 5),
        {"segment": (4, 6), "dilation": (2, 3), "offsets": "per_head", "scale": 0.3},
    ),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype)


def output(options):
    return jax.jit(functools.partial(dilated_attention, **options))


def both(options):
    return jax.jit(functools.partial(dilated_attention, **options, return_residuals=True))


def assert_equal(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@forms
def test_leading_axes(form):
    size, options = form
    q, k, v = draw(3, 2, 3, *size, 2, 4)
    out, lse = both(options)(q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    alone = both(options)
    for i, j in np.ndindex(2, 3):
        assert_equal((out[i, j], lse[i, j]), alone(q[i, j], k[i, j], v[i, j]))


def test_packed_is_the_same():
    size, options = FORMS["plane"]
    qkv = draw(2, *size, 3, 2, 4)
    packed = functools.partial(dilated_attention_qkvpacked, **options, return_residuals=True)
    assert_equal(jax.jit(packed)(qkv), both(options)(*jnp.moveaxis(qkv, -3, 0)), atol=1e-6)


@forms
def test_vmap(form):
    size, options = form
    q, k, v = draw(3, 2, *size, 2, 4)
    assert_equal(jax.vmap(both(options))(q, k, v), both(options)(q, k, v))
    across = jax.vmap(output(options), in_axes=(1, None, 0), out_axes=1)
    got = across(jnp.moveaxis(q, 0, 1), k[0], v)
    assert_equal(got[:, 1], both(options)(q[1], k[0], v[1])[0])


def test_jit():
    size, options = FORMS["plane"]
    q, k, v = draw(3, 2, *size, 2, 4)
    want = dilated_attention(q, k, v, **options, return_residuals=True)
    assert_equal(both(options)(q, k, v), want)


@forms
def test_checkpoint_leaves_the_gradient(form):
    size, options = form
    q, k, v = draw(3, *size, 2, 4)

    def gradient(attend):
        return jax.jit(jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2)))

    attend = output(options)
    assert_equal(gradient(jax.checkpoint(attend))(q, k, v), gradient(attend)(q, k, v))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        q = draw(4, 6, 2, 4, dtype=dtype)
        rel = {"rel_h": q[..., :2].astype("float32"), "rel_w": q[..., :3]}
        out, lse = both({"segment": (4, 6), "dilation": 2})(q, q, q, **rel)
        assert out.dtype == dtype
        assert lse.dtype == ("float64" if dtype == "float64" else "float32")


def test_scale_default_is_the_root_of_the_width():
    qkv = draw(3, 12, 2, 16)
    want = output({"segment": 6})(*qkv)
    assert_equal(output({"segment": 6, "scale": 0.25})(*qkv), want, atol=0)


def test_numpy_arrays_are_taken():
    q = np.ones((8, 2, 4), np.float32)
    assert_equal(dilated_attention(q, q, q, segment=4), q, atol=1e-6)


@pytest.mark.parametrize(("height", "padded"), [(8, False), (7, True)])
def test_only_what_needs_it_is_padded_and_masked(height, padded):
    q = draw(height, 8, 2, 4)
    options = {"segment": (4, 4), "dilation": 2, "implementation": "reference"}
    attend = functools.partial(dilated_attention, **options)
    traced = jax.make_jaxpr(attend)(q, q, q)
    assert ("pad[" in str(traced)) == padded
    assert len(traced.consts) == padded  # the mask of real keys
