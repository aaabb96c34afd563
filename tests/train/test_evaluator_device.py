"""What runs on the devices, piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax.preprocess import Frame, host_pixels
from tests.models import random_model
from train import evaluator_device as device
from train.evaluator_load import resized


@pytest.mark.parametrize("size", [(40, 24), (37, 19), (1, 1), (9, 40)])
def test_packed_masks_come_back(size):
    mask = np.random.default_rng(0).random(size) < 0.5
    bits = device.pack(np.asfortranarray(mask.astype(np.uint8)), (40, 48))
    assert bits.shape == (48, 5)
    np.testing.assert_array_equal(device.unpack(bits, size), mask)
    on_device = np.asarray(device._unpack(bits))
    np.testing.assert_array_equal(on_device[: size[0], : size[1]], mask)
    assert on_device.sum() == mask.sum()


@pytest.mark.parametrize("reach", [1, 3, 9])
def test_the_boundary_is_opencvs(reach):
    import cv2

    noise = cv2.GaussianBlur(np.random.default_rng(reach).normal(size=(40, 56)), (0, 0), 4)
    mask = np.zeros((48, 64), bool)
    mask[:40, :56] = noise > -0.02
    mask[:, 60:] = True  # reaches the canvas's edge, which is background too
    padded = np.pad(mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=reach)[1:-1, 1:-1]
    want = mask & (inner == 0)
    np.testing.assert_array_equal(device._boundary(jnp.asarray(mask), jnp.int32(reach)), want)
    assert want.sum() > 30


def test_tight_boxes():
    mask = np.zeros((6, 8), bool)
    assert device.tight_box(jnp.asarray(mask)).tolist() == [0, 0, 0, 0]
    mask[2, 3] = mask[4, 5] = True
    assert device.tight_box(jnp.asarray(mask)).tolist() == [3, 2, 6, 5]


def test_the_embedding_is_that_of_the_hosts_pixels():
    images = [np.random.default_rng(i).integers(0, 256, (s, t, 3), np.uint8)
              for i, (s, t) in enumerate([(50, 90), (64, 64), (200, 31)])]  # fmt: skip
    frames = [Frame(image.shape[:2], 64) for image in images]
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    for i, (image, frame) in enumerate(zip(images, frames, strict=True)):
        part = resized(image, frame)
        pixels[i, : part.shape[0], : part.shape[1]] = part
    inputs = np.array([frame.input for frame in frames], np.int32)
    model = random_model()
    (got, _), _ = jax.jit(device.embed, static_argnames="dtype")(
        (model, None), pixels, inputs, dtype=jnp.float32
    )
    host = np.stack([host_pixels(*each) for each in zip(images, frames, strict=True)])
    want = jax.jit(lambda model, x: model.encode(x)[0])(model, host)
    np.testing.assert_allclose(got, want, atol=2e-5)
