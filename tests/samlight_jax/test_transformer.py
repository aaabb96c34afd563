"""`TwoWayTransformer` against segment-anything, and the slots that nothing attends."""

import jax.numpy as jnp
import numpy as np
import torch

from tests.conftest import assert_parity, normal, run

IMAGE, IMAGE_PE = normal(2, 25, 256, seed=1), normal(25, 256, seed=2)
TOKENS = normal(2, 7, 256, seed=3)


def two_way(twins, tokens, valid):
    return run(twins.flax.mask_decoder.transformer, IMAGE, IMAGE_PE, tokens, valid)


def test_tokens_and_image_attend_each_other_as_in_sam(twins):
    image, pe = (
        torch.from_numpy(x).reshape(-1, 5, 5, 256).permute(0, 3, 1, 2) for x in (IMAGE, IMAGE_PE)
    )
    want_tokens, want_image = twins.torch.mask_decoder.transformer(
        image, pe.expand(2, -1, -1, -1), torch.from_numpy(TOKENS)
    )
    tokens, image = two_way(twins, TOKENS, jnp.ones((2, 7), bool))
    assert_parity(tokens, want_tokens)
    assert_parity(image, want_image)


def test_what_an_invalid_slot_holds_changes_nothing(twins):
    """Bit for bit; the rows of a batch may have different numbers of slots."""
    valid = np.arange(7) < [[7], [4]]
    other = np.where(valid[..., None], TOKENS, 1e3 * normal(2, 7, 256, seed=4))
    assert (other != TOKENS).any()
    tokens, image = two_way(twins, TOKENS, valid)
    other_tokens, other_image = two_way(twins, other, valid)
    np.testing.assert_array_equal(image, other_image)
    np.testing.assert_array_equal(tokens[valid], other_tokens[valid])


def test_a_valid_slot_changes_everything(twins):
    all_valid, one_less = np.ones((2, 7), bool), np.arange(7) < [[6], [6]]
    tokens, image = two_way(twins, TOKENS, all_valid)
    fewer_tokens, fewer_image = two_way(twins, TOKENS, one_less)
    assert np.abs(tokens - fewer_tokens)[:, :6].max() > 0.01
    assert np.abs(image - fewer_image).max() > 0.01
