import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from samlight_jax import flat, weights
from tests.models import TINY, random_arrays, random_model


def leaves(model):
    return jax.tree.leaves(model)


def assert_same(found, model):
    """The very arrays of the model, in its order."""
    assert found.tree == jax.tree.structure(model)
    assert all(x is y for x, y in zip(found.arrays, leaves(model), strict=True))


def test_the_arrays_of_a_model_as_it_is_now():
    model = weights.build(TINY, random_arrays(TINY))  # one of its own, to be changed
    first = flat.flat(model)
    assert_same(first, model)
    (known,) = flat._KNOWN[model].values()
    # Another array in a variable.
    kernel = model.image_encoder.neck.conv1.kernel
    kernel[...] = jnp.ones(kernel.shape)
    assert_same(flat.flat(model), model)
    assert list(flat._KNOWN[model].values()) == [known]
    # Another variable in its place, and another part.
    model.image_encoder.neck.conv1.kernel = nnx.Param(jnp.zeros((1, 1, 4, 4)))
    assert_same(flat.flat(model), model)
    assert list(flat._KNOWN[model].values()) != [known]
    model.image_encoder = random_model(seed=1).image_encoder
    assert_same(flat.flat(model), model)


def test_a_jitted_function_takes_it_and_compiles_once():
    model, pixels = random_model(), jnp.ones((1, 64, 64, 3))
    traced = []

    @jax.jit
    def run(parts, x):
        traced.append(x)
        return parts.model().encode(x)[0]

    want = jax.jit(lambda model, x: model.encode(x)[0])(model, pixels)
    for _ in range(2):
        np.testing.assert_array_equal(run(flat.flat(model), pixels), want)
    run(flat.flat(random_model(seed=1)), pixels)  # of the same structure
    assert len(traced) == 1


def test_a_model_that_is_gone_is_forgotten():
    model = weights.build(TINY, random_arrays(TINY))
    flat.flat(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_part_is_enough_for_what_it_does():
    model, pixels = random_model(), jnp.ones((1, 64, 64, 3))
    encoder, decoder = (flat.flat(model, part) for part in (flat.ENCODER, flat.DECODER))
    assert len(encoder.arrays) + len(decoder.arrays) == len(leaves(model))
    assert flat.flat(model, flat.ENCODER).arrays[0] is encoder.arrays[0]
    embedding = jax.jit(lambda parts, x: parts.model().encode(x)[0])(encoder, pixels)
    np.testing.assert_array_equal(embedding, jax.jit(lambda m, x: m.encode(x)[0])(model, pixels))
    assert decoder.model().image_encoder.neck.conv1.kernel.get_raw_value() is None
