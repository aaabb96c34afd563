"""`PromptEncoder` against segment-anything; the slots of `Prompts` against its sequence."""

import numpy as np
import pytest
import torch

from samlight_jax.preprocess import Frame
from samlight_jax.prompts import assemble
from tests.conftest import assert_parity, nhwc, normal, run

FRAME = Frame((80, 80), 80)  # photograph pixels are the frame's
COORDS = np.array([[[10.0, 20], [79, 0.5]], [[0, 0], [33.3, 80]]])
LABELS = np.array([[1, 0], [0, 1]])
BOXES = np.array([[5.0, 6, 70, 71], [-3, 0, 20.5, 85]])
MASKS = 5 * normal(2, 20, 20)

PROMPTS = {
    "points": {"point_coords": COORDS, "point_labels": LABELS},
    "boxes": {"boxes": BOXES},
    "points and boxes": {"point_coords": COORDS, "point_labels": LABELS, "boxes": BOXES},
    "masks": {"masks": MASKS},
    "everything": {
        "point_coords": COORDS,
        "point_labels": LABELS,
        "boxes": BOXES,
        "masks": MASKS,
    },
    "a label of -1": {"point_coords": COORDS, "point_labels": np.array([[1, -1], [-1, -1]])},
}


def sams_prompts(point_coords=None, point_labels=None, boxes=None, masks=None):
    points = None
    if point_coords is not None:
        points = torch.tensor(point_coords, dtype=torch.float32), torch.from_numpy(point_labels)
    boxes = None if boxes is None else torch.tensor(boxes, dtype=torch.float32)
    return points, boxes, None if masks is None else torch.from_numpy(masks)[:, None]


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_prompts_are_embedded_as_in_sam(twins, prompts):
    want, want_dense = twins.torch.prompt_encoder(*sams_prompts(**prompts))
    ours = assemble(FRAME, twins.flax.config, 2, **prompts, absent=False)
    sparse, dense = run(twins.flax.prompt_encoder, ours)
    tokens = want.shape[1]
    assert ours.valid.sum(axis=1).tolist() == [tokens, tokens]
    if tokens:
        assert_parity(sparse[ours.valid].reshape(want.shape), want)
    assert_parity(np.broadcast_to(dense, (2, *dense.shape[1:])), nhwc(want_dense))


def test_points_of_labels_2_and_3_are_a_boxs_corners(twins):
    """As in SAM's ONNX export."""
    points = {"point_coords": BOXES.reshape(2, 2, 2), "point_labels": np.array([[2, 3], [2, 3]])}
    ours = assemble(FRAME, twins.flax.config, 2, **points, absent=False)
    want = twins.torch.prompt_encoder(*sams_prompts(boxes=BOXES))[0]
    assert_parity(run(twins.flax.prompt_encoder, ours)[0][:, :2], want)


def test_the_positions_of_the_tokens_are_sams(twins):
    want = twins.torch.prompt_encoder.get_dense_pe()
    assert_parity(twins.flax.prompt_encoder.dense_pe()[None], nhwc(want))


def test_a_row_without_a_mask_gets_no_mask_whatever_the_array_holds(twins):
    ours = assemble(FRAME, twins.flax.config, 2, masks=MASKS, absent=False)
    want = twins.torch.prompt_encoder(*sams_prompts(boxes=BOXES))[1]
    _, dense = run(twins.flax.prompt_encoder, ours._replace(has_mask=np.array([True, False])))
    assert_parity(dense[1:], nhwc(want[1:]))
    want = twins.torch.prompt_encoder(*sams_prompts(masks=MASKS))[1]
    assert_parity(dense[:1], nhwc(want[:1]))
