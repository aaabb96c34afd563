"""`MaskDecoder` against segment-anything, whatever the number of padded slots."""

import numpy as np
import pytest
import torch

from tests.conftest import assert_parity, nchw, normal, run

EMBEDDING, PE = normal(5, 5, 256, seed=1), normal(5, 5, 256, seed=2)
SPARSE, DENSE = normal(3, 4, 256, seed=3), normal(3, 5, 5, 256, seed=4)


@pytest.fixture(scope="module")
def want(twins):
    """SAM's four masks and predicted IoU for three prompts of four tokens."""
    return twins.torch.mask_decoder.predict_masks(
        nchw(EMBEDDING[None]), nchw(PE[None]), torch.from_numpy(SPARSE), nchw(DENSE)
    )


@pytest.mark.parametrize("slots", [4, 8, 32])
def test_masks_and_iou_are_sams_in_every_bucket(twins, want, slots):
    junk = 10 * normal(3, slots - 4, 256, seed=5)
    valid = np.broadcast_to(np.arange(slots) < 4, (3, slots))
    sparse = np.concatenate([SPARSE, junk], axis=1)
    masks, iou = run(twins.flax.mask_decoder, EMBEDDING, PE, sparse, DENSE, valid)
    assert masks.shape == (3, 4, 20, 20)
    assert_parity(masks, want[0])
    assert_parity(iou, want[1])


def test_a_prompt_without_tokens_is_decoded_from_the_mask_alone(twins):
    want, _ = twins.torch.mask_decoder.predict_masks(
        nchw(EMBEDDING[None]), nchw(PE[None]), torch.from_numpy(SPARSE[:, :0]), nchw(DENSE)
    )
    nothing = np.zeros((3, 4), bool)
    masks, _ = run(twins.flax.mask_decoder, EMBEDDING, PE, SPARSE, DENSE, nothing)
    assert_parity(masks, want)


def test_a_dense_embedding_for_all_prompts_is_the_same_for_each(twins):
    valid = np.ones((3, 4), bool)
    each, one = np.repeat(DENSE[:1], 3, axis=0), DENSE[:1]
    got, want = (run(twins.flax.mask_decoder, EMBEDDING, PE, SPARSE, x, valid) for x in (one, each))
    for a, b in zip(got, want, strict=True):
        assert np.std(b) > 0.01
        np.testing.assert_allclose(a, b, atol=1e-5)
