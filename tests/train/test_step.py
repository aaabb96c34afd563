import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import TrainConfig
from train.schedule import paces
from train.step import keys_of, make_optimizer, rated

PARAMS = {
    "image_encoder.blocks.0.mlp.lin1.kernel": np.eye(4, 6, dtype=np.float32),
    "image_encoder.blocks.0.mlp.lin1.bias": np.ones(6, np.float32),
    "image_encoder.neck.conv1.kernel": np.ones((1, 1, 4, 6), np.float32),
    "mask_decoder.iou_token.embedding": np.ones((1, 4), np.float32),
    "projectors.blocks.0.kernel": np.eye(4, dtype=np.float32),
}
MATRIX = "image_encoder.blocks.0.mlp.lin1.kernel"


def one_update(**changes):
    """What one step at the peak rate does to `PARAMS`, for gradients of normal noise."""
    fields = {"lr": 0.1, "decoder_lr": 0.01, "warmup": 0, "weight_decay": 0.0, "clip": 1e9}
    config = TrainConfig(**fields | changes)
    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.asarray, PARAMS)
    rng = np.random.default_rng(0)
    gradients = {n: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for n, x in params.items()}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    first = jax.tree.map(lambda x: x[0], paces(config, 0))
    return {name: np.asarray(x) for name, x in rated(updates, first).items()}


def test_muon_moves_the_matrices_of_blocks_in_all_directions_alike():
    muon, adamw = one_update(optimizer="muon"), one_update(optimizer="adamw")
    singular = np.linalg.svd(muon[MATRIX])[1]
    assert singular.max() / singular.min() < 2  # Newton-Schulz leaves 0.7 to 1.2
    singular = np.linalg.svd(adamw[MATRIX])[1]
    assert singular.max() / singular.min() > 2
    # Scaled to about the size of AdamW's step, which is the rate.
    assert 0.1 < np.sqrt((muon[MATRIX] ** 2).mean()) / 0.1 < 0.5


def test_everything_else_is_adamws():
    muon, adamw = one_update(optimizer="muon"), one_update(optimizer="adamw")
    for name in PARAMS.keys() - {MATRIX}:
        assert np.array_equal(muon[name], adamw[name])
        rate = 0.01 if name.startswith("mask_decoder.") else 0.1
        assert np.allclose(abs(muon[name]), rate, rtol=1e-3)  # Adam's first step


def test_weight_decay_takes_matrices_alone():
    plain, decayed = one_update(optimizer="adamw"), one_update(optimizer="adamw", weight_decay=0.5)
    for name, x in PARAMS.items():
        rate = 0.01 if name.startswith("mask_decoder.") else 0.1
        want = rate * 0.5 * x if x.ndim > 1 else np.zeros_like(x)
        assert np.allclose(plain[name] - decayed[name], want, atol=1e-7), name


def test_a_row_has_the_same_key_in_every_batch_size():
    few, many = (jax.random.key_data(keys_of(3, jnp.int32(5), n)) for n in (4, 8))
    assert np.array_equal(few, many[:4])
    assert len(np.unique(many, axis=0)) == 8
    assert not np.array_equal(few, jax.random.key_data(keys_of(3, jnp.int32(6), 4)))


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_gradients_are_clipped_together(clip):
    """AdamW's first step forgets the gradient's size; that of momentum shows it."""
    optimizer = make_optimizer(TrainConfig(clip=clip, optimizer="adamw"))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.update(params, optimizer.init(params), params)[1]
    norm = np.sqrt(sum((x**2).sum() for x in PARAMS.values()))
    scale = min(1, clip / norm)
    keystr = jax.tree_util.keystr
    means = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if ".mu" in keystr(path)]
    assert np.isclose(max(float(abs(x).max()) for x in means), 0.1 * scale, rtol=1e-5)
