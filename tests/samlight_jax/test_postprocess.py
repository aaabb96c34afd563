"""Masks at the photograph's size against segment-anything's two resizes and crop."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from samlight_jax.postprocess import photo_logits, resize_weights
from samlight_jax.preprocess import Frame
from tests import oracles
from tests.conftest import assert_parity, normal

SIZES = [  # of the photograph (height, width), of the frame
    ((256, 256), 256),
    ((100, 256), 256),
    ((511, 300), 256),
    ((37, 91), 256),
    ((257, 255), 256),
    ((640, 17), 256),
    ((3, 200), 256),
    ((100, 1), 256),
    ((1, 100), 256),
    ((1, 1), 256),
    ((480, 640), 1024),
    ((1500, 1100), 1024),
    ((70, 50), 16),
]


@pytest.mark.parametrize("size, image_size", SIZES, ids=str)
def test_logits_are_segment_anythings(size, image_size):
    frame = Frame(size, image_size)
    low_res = normal(2, 3, image_size // 4, image_size // 4)
    sam = types.SimpleNamespace(image_encoder=types.SimpleNamespace(img_size=image_size))
    want = oracles.segment_anything().modeling.Sam.postprocess_masks(
        sam, torch.from_numpy(low_res), frame.input, frame.original
    )
    assert want.shape == (2, 3, *size)
    assert_parity(photo_logits(low_res, frame), want)
    assert_parity(photo_logits(jnp.asarray(low_res), frame), want)


def test_numpy_stays_on_the_host_and_equals_the_device():
    frame, low_res = Frame((90, 60), 64), normal(3, 16, 16)
    host, device = photo_logits(low_res, frame), photo_logits(jnp.asarray(low_res), frame)
    assert isinstance(host, np.ndarray) and isinstance(device, jax.Array)
    np.testing.assert_allclose(host, device, atol=1e-5)


def test_each_pixel_is_a_mean_of_low_res_pixels():
    for weights in resize_weights(Frame((90, 61), 64), 16):
        assert weights.min() >= 0
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_the_gradient_is_the_transposed_resize():
    frame, low_res, up = Frame((90, 61), 64), normal(16, 16), normal(90, 61, seed=1)
    gradient = jax.grad(lambda x: (photo_logits(x, frame) * up).sum())(jnp.asarray(low_res))
    tensor = torch.from_numpy(low_res)[None, None].requires_grad_()
    sam = types.SimpleNamespace(image_encoder=types.SimpleNamespace(img_size=64))
    sa = oracles.segment_anything().modeling.Sam
    out = sa.postprocess_masks(sam, tensor, frame.input, frame.original)
    (out[0, 0] * torch.from_numpy(up)).sum().backward()
    assert_parity(gradient, tensor.grad[0, 0])
