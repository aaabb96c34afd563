import jax
import jax.numpy as jnp
import numpy as np

from train import sensitivity


def linear(along):
    """A decoder whose four masks all follow one direction of the embedding, near 0.5."""

    def decode(embedding, prompts):
        q, (height, width, _) = len(prompts.labels), embedding.shape
        logits = jnp.kron(embedding @ along, jnp.ones((4, 4)))
        return jnp.broadcast_to(logits, (q, 4, 4 * height, 4 * width)), jnp.ones((q, 4))

    return decode


def test_the_gram_matrix_of_a_linear_decoder():
    """Of 8 prompts with 4 masks each, every token moves 16 pixels' probabilities by 1/4."""
    along = np.array([3.0, 0.0, 4.0], np.float32)
    size, keys = jnp.array([64, 32]), jax.random.split(jax.random.key(0), 400)
    empty = jnp.zeros((4, 4, 3))  # 16 tokens, of which the view holds 4 x 2
    got = np.mean([sensitivity.gram(linear(along), empty, size, key) for key in keys[:40]], axis=0)
    pixels = 8 * 4 * 16 * 8
    want = pixels * np.outer(along, along) / 16
    np.testing.assert_allclose(got, want, rtol=0.15)  # signs are random
    np.testing.assert_allclose(got / got[0, 0], want / want[0, 0], atol=1e-5)  # the direction not


def test_the_root_weighs_what_matters_and_a_mean_guess_is_one():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.array([1e4, 1e2, 1.0, 1.0, 1e-2, 0.0])
    spread = rng.normal(size=(6, 6))
    covariance = spread @ spread.T
    root = sensitivity.root(turn * values @ turn.T, covariance)
    np.testing.assert_allclose(root, root.T, atol=1e-6)
    weight = np.linalg.norm(turn.T @ root, axis=1) ** 2
    least = sensitivity.LEAST * values.mean()
    want = np.maximum(values, least) ** 0.5
    np.testing.assert_allclose(weight / weight[0], want / want[0], rtol=1e-3)
    errors = rng.multivariate_normal(np.zeros(6), covariance, 200_000)
    np.testing.assert_allclose(np.mean((errors @ root) ** 2), 1, rtol=0.02)
