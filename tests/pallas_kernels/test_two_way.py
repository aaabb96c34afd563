"""Attention between map and tokens: against its definition, interpreted and on a real GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import two_way
from pallas_kernels.device import Device, assume
from pallas_kernels.two_way import ToImage, ToTokens, image_to_tokens, tokens_to_image
from tests.pallas_kernels.conftest import INTERPRETED, PRECISION, on_four_devices

HEADS, EPSILON = 4, 1e-5
CASES = {  # images, prompts of each, tokens, map, dtype, error
    "one image for all prompts": (1, 3, 7, 128, "bfloat16", 6e-2),
    "an image for each": (2, 1, 5, 64, "bfloat16", 6e-2),
    "more tokens": (2, 2, 19, 192, "float16", 8e-3),
    "several tiles a program": (2, 64, 5, 256, "bfloat16", 6e-2),
    "plainly, in float32": (2, 3, 6, 30, "float32", 3e-5),
}


def draw(images, prompts, tokens, size, dtype, seed=0, c=64, d=32):
    random = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * random.normal(size=shape), dtype)

    def matrix(rows, columns):
        return normal(rows, columns, scale=rows**-0.5)

    valid = random.random((images, prompts, tokens)) < 0.7
    return {
        "image": normal(images, size, c),
        "positions": normal(size, c),
        "keys": normal(images, prompts, tokens, d),
        "values": normal(images, prompts, tokens, d),
        "valid": jnp.asarray(valid).at[:, :, 0].set(True),
        "to_tokens": ToTokens(
            *(matrix(c, d), normal(d), matrix(d, c), normal(c)),
            *(1 + normal(c, scale=0.1), normal(c, scale=0.1)),
        ),
        "to_image": ToImage(matrix(c, d), matrix(c, d), normal(d)),
    }


def heads_of(x):
    return np.split(x, HEADS, axis=-1)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def oracle_to_tokens(image, positions, keys, values, valid, weights):
    """Prompt by prompt, head by head, in float64, projections and all."""
    image, positions, keys, values, w = wide((image, positions, keys, values, weights))
    out = np.zeros((*keys.shape[:2], *image.shape[1:]))
    for i, j in np.ndindex(*keys.shape[:2]):
        seen = np.asarray(valid[i, j])
        q = (image[i] + positions) @ w.q + w.q_bias
        found = [
            softmax(a @ k.T / np.sqrt(k.shape[-1])) @ v
            for a, k, v in zip(
                *(heads_of(x) for x in (q, keys[i, j][seen], values[i, j][seen])), strict=True
            )
        ]
        y = image[i] + np.concatenate(found, -1) @ w.out + w.out_bias
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + EPSILON)
        out[i, j] = y * w.scale + w.shift
    return out


def oracle_to_image(image, positions, queries, weights):
    image, positions, queries, w = wide((image, positions, queries, weights))
    out = np.zeros(queries.shape)
    for i, j in np.ndindex(*queries.shape[:2]):
        k, v = (image[i] + positions) @ w.k + 3.0, image[i] @ w.v + w.v_bias  # a bias for keys
        found = [
            softmax(q @ a.T / np.sqrt(q.shape[-1])) @ b
            for q, a, b in zip(*map(heads_of, (queries[i, j], k, v)), strict=True)
        ]
        out[i, j] = np.concatenate(found, -1)
    return out


TO_TOKENS = "image", "positions", "keys", "values", "valid", "to_tokens"
TO_IMAGE = "image", "positions", "keys", "to_image"
OPERATIONS = {
    "image to tokens": (image_to_tokens, oracle_to_tokens, TO_TOKENS),
    "tokens to image": (tokens_to_image, oracle_to_image, TO_IMAGE),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_what_its_definition_says(kernel, operation, case):
    *shape, error = case
    run, oracle, names = operation
    given = draw(*shape)
    args = [given[name] for name in names]
    reason = two_way.unsupported(args[0], shape[2], HEADS)
    assert (reason is None) == (shape[-1] != "float32")
    want = oracle(*args)
    with jax.default_matmul_precision(PRECISION[args[0].dtype.itemsize]):
        got = jax.jit(functools.partial(run, heads=HEADS))(*args)
    assert got.dtype == args[0].dtype
    np.testing.assert_allclose(np.asarray(got).astype(float), want, atol=error)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_gradients_are_those_of_the_plain_form(kernel, operation):
    run, _, names = operation
    given = draw(2, 2, 5, 64, "bfloat16")
    floats = {name: given[name] for name in names if name != "valid"}

    def loss(floats):
        args = [{**given, **floats}[name] for name in names]
        return (run(*args, heads=HEADS).astype(jnp.float32) ** 2).sum()

    got = jax.jit(jax.grad(loss))(floats)
    with assume(Device("cpu", "cpu")):
        want = jax.jit(jax.grad(loss))(floats)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z).astype(float) for z in (x, y))
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_vmap_over_images(kernel, operation):
    run, oracle, names = operation
    several = [draw(1, 2, 5, 64, "bfloat16", seed) for seed in range(3)]
    shared = ("positions", "to_tokens", "to_image")
    given = {
        name: several[0][name] if name in shared else jnp.stack([each[name] for each in several])
        for name in names
    }
    axes = [None if name in shared else 0 for name in names]
    got = jax.jit(jax.vmap(functools.partial(run, heads=HEADS), axes))(*given.values())
    for i, each in enumerate(several):
        want = oracle(*(given[name] if name in shared else each[name] for name in names))
        np.testing.assert_allclose(np.asarray(got[i]).astype(float), want, atol=6e-2)


def sharded():
    """Images and prompts divide among four devices: no message, equal numbers."""
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    given = draw(2, 2, 5, 64, "bfloat16")
    specs = dict.fromkeys(("keys", "values", "valid"), PartitionSpec("rows", "columns"))
    specs["image"] = PartitionSpec("rows")
    for run, oracle, names in OPERATIONS.values():
        args = [given[name] for name in names]
        placed = [
            jax.device_put(x, NamedSharding(mesh, specs.get(name, PartitionSpec())))
            for name, x in zip(names, args, strict=True)
        ]
        with assume(INTERPRETED):
            call = jax.jit(functools.partial(run, heads=HEADS)).lower(*placed).compile()
        assert "all-" not in call.as_text(), call.as_text()
        got = call(*placed)
        assert got.addressable_shards[0].data.size * 4 == got.size
        np.testing.assert_allclose(np.asarray(got).astype(float), oracle(*args), atol=6e-2)


def test_images_and_prompts_divide_among_devices_without_messages():
    on_four_devices(f"from {__name__} import sharded; sharded()")


def test_what_the_kernels_do_not_take_runs_plainly():
    image = draw(1, 1, 5, 64, "bfloat16")["image"]
    assert "(cpu)" in two_way.unsupported(image, 5, HEADS) or jax.default_backend() != "cpu"
    with assume(INTERPRETED):
        assert two_way.unsupported(image, 5, HEADS) is None
        assert "16-bit types" in two_way.unsupported(image.astype("float32"), 5, HEADS)
        assert "steps of 64" in two_way.unsupported(image[:, :63], 5, HEADS)
        assert "64 to 256 channels" in two_way.unsupported(image[..., :32], 5, HEADS)
        assert "tokens=33" in two_way.unsupported(image, 33, HEADS)
