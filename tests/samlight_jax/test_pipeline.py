"""`predict`, `predict_batch`, `encode`: shapes, transformations, compilations, bad input."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import samlight_jax
from samlight_jax import InputError, pipeline
from tests.models import random_model

HEIGHT, WIDTH = 40, 60
POINT = {"point_coords": [[30, 20]], "point_labels": [1]}
BOX = {"box": [10, 5, 50, 35]}


@pytest.fixture(scope="module")
def model():
    return random_model()


def assert_close(got, want, ulps=200):
    """Equal but for the rounding of float32 on the way through the model."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=ulps * 2**-24 * np.abs(want).max())


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def prompt(points=0, box=False, mask=False, seed=0):
    """A prompt for `predict` with so many points."""
    rng = np.random.default_rng(seed)
    parts = {}
    if points:
        parts["point_coords"] = rng.uniform(0, (WIDTH, HEIGHT), (points, 2))
        parts["point_labels"] = rng.integers(0, 2, points)
    if box:
        parts |= BOX
    if mask:
        parts["mask_input"] = rng.normal(size=(1, 16, 16))
    return parts


@pytest.mark.parametrize("multimask", [True, False])
def test_results_have_sams_shapes_and_dtypes(model, image, multimask):
    masks, iou, low_res = samlight_jax.predict(
        image, **POINT, multimask_output=multimask, model=model
    )
    c = 3 if multimask else 1
    assert masks.shape == (c, HEIGHT, WIDTH) and masks.dtype == bool
    assert iou.shape == (c,) and iou.dtype == np.float32
    assert low_res.shape == (c, 16, 16) and low_res.dtype == np.float32
    assert all(isinstance(x, np.ndarray) for x in (masks, iou, low_res))
    assert 0 < masks.mean() < 1, "a mask of both signs, or the other tests see nothing"


def test_prompts_matter_and_logits_are_the_masks(model, image):
    by_point = samlight_jax.predict(image, **POINT, model=model, return_logits=True)
    by_box = samlight_jax.predict(image, **BOX, model=model, return_logits=True)
    assert np.abs(by_point[2] - by_box[2]).max() > 0.01
    masks = samlight_jax.predict(image, **POINT, model=model)[0]
    np.testing.assert_array_equal(masks, by_point[0] > 0)


def test_multimask_takes_masks_one_to_three_and_single_takes_mask_zero(model, image):
    pixels = pipeline._pixels(image, pipeline.Frame(image.shape[:2], 64))
    embedding = model.encode(jnp.asarray(pixels[None]))[0][0]
    frame = pipeline.Frame(image.shape[:2], 64)
    box = np.array([BOX["box"]])
    prompts = pipeline.prompts_.assemble(frame, model.config, 1, boxes=box, absent=False)
    logits, iou = model.decode(embedding, prompts)
    three = samlight_jax.predict(image, **BOX, model=model)
    one = samlight_jax.predict(image, **BOX, model=model, multimask_output=False)
    assert_close(three[2], logits[0, 1:])
    assert_close(one[2], logits[0, :1])
    assert_close(np.append(one[1], three[1]), iou[0])


def test_a_jax_image_gives_jax_arrays_close_to_the_hosts(model, image):
    host = samlight_jax.predict(image, **BOX, model=model, return_logits=True)
    device = samlight_jax.predict(jnp.asarray(image), **BOX, model=model, return_logits=True)
    assert all(isinstance(x, jax.Array) for x in device)
    spread = np.std(host[0])
    # PIL rounds between its two passes: at most one grey level apart.
    np.testing.assert_allclose(device[0], host[0], atol=0.1 * spread)


def test_an_embedding_of_encode_stands_for_the_image(model, image):
    embedding, features = samlight_jax.encode(image, model=model, return_features=True)
    assert embedding.shape == (4, 4, 256)
    assert {name: x.shape for name, x in features.items()} == {
        "patch_embed": (4, 4, 32),
        "blocks.0": (4, 4, 32),
        "blocks.1": (4, 4, 32),
    }
    want = samlight_jax.predict(image, **BOX, model=model)
    got = samlight_jax.predict(image, **BOX, model=model, image_embedding=embedding)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bgr_equals_the_reversed_rgb(model, image):
    want = samlight_jax.predict(image, **BOX, model=model)[2]
    got = samlight_jax.predict(image[..., ::-1], **BOX, model=model, image_format="BGR")[2]
    np.testing.assert_array_equal(want, got)


def test_jit_equals_eager(model, image):
    def run(image, points):
        return samlight_jax.predict(image, points, jnp.array([1]), model=model, return_logits=True)

    arguments = jnp.asarray(image), jnp.array([[30.0, 20.0]])
    for eager, jitted in zip(run(*arguments), jax.jit(run)(*arguments), strict=True):
        assert_close(eager, jitted)


def test_vmap_over_images_and_over_prompts_equals_single_calls(model, image):
    images = jnp.stack([jnp.asarray(image), jnp.asarray(image[::-1])])
    boxes = jnp.array([[10.0, 5, 50, 35], [0, 0, 20, 20]])

    def run(image, box):
        return samlight_jax.predict(image, box=box, model=model, return_logits=True)

    together = jax.vmap(jax.vmap(run, (None, 0)), (0, None))(images, boxes)
    for i in range(2):
        for j in range(2):
            for a, b in zip(together, run(images[i], boxes[j]), strict=True):
                assert_close(a[i, j], b)


def test_gradients_reach_the_image_the_prompts_and_the_embedding(model, image):
    embedding = samlight_jax.encode(image, model=model)

    def loss(image, points, box, mask, embedding=None):
        logits, iou, _ = samlight_jax.predict(
            image,
            points,
            jnp.array([1]),
            box,
            mask,
            model=model,
            return_logits=True,
            image_embedding=embedding,
        )
        return jnp.tanh(logits).mean() + iou.sum()

    arguments = (
        jnp.asarray(image, jnp.float32),
        jnp.array([[30.0, 20.0]]),
        jnp.array([10.0, 5, 50, 35]),
        jax.random.normal(jax.random.key(0), (1, 16, 16)),
    )
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
    gradients += jax.grad(loss, argnums=(4,))(*arguments, embedding)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    # Uphill along the image's own gradient, the loss rises by the gradient's length.
    length = jnp.linalg.norm(gradients[0])
    step = 2.0 * gradients[0] / length
    ends = [loss(arguments[0] + sign * step, *arguments[1:]) for sign in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 4.0, length, rtol=0.05)


def test_gradients_reach_the_model_from_a_host_image(model, image):
    def loss(model):
        return samlight_jax.predict(image, **BOX, model=model, return_logits=True)[0].mean()

    gradient = jax.grad(loss, allow_int=True)(model)
    largest = jax.tree.map(lambda x: float(jnp.abs(x).max()), nnx.state(gradient, nnx.Param))
    assert max(jax.tree.leaves(largest)) > 0


def test_a_bad_prompt_is_refused_before_the_encoder_runs(model, image, monkeypatch):
    monkeypatch.setattr(pipeline, "_encode", None)
    monkeypatch.setattr(pipeline, "_pixels", None)
    with pytest.raises(InputError, match="is empty"):
        samlight_jax.predict(image, box=[9, 9, 3, 3], model=model)
    with pytest.raises(InputError, match="is empty"):
        samlight_jax.predict_batch([image], boxes=[[[9, 9, 3, 3]]], model=model)


def test_twenty_photo_sizes_and_all_prompts_compile_once_and_masks_once_more(model):
    jax.clear_caches()
    rng = np.random.default_rng(0)
    for i in range(20):
        shape = (int(rng.integers(20, 90)), int(rng.integers(20, 90)), 3)
        photo = rng.integers(0, 256, shape, np.uint8)
        parts = prompt(points=i % 5, box=i % 2 == 0, mask=i % 3 == 0)
        if "point_coords" in parts:
            parts["point_coords"] = parts["point_coords"] * 0 + 5
        if "box" in parts:
            parts["box"] = [1, 1, 15, 15]
        samlight_jax.predict(photo, **parts, model=model)
    assert pipeline._encode._cache_size() == 1
    assert pipeline._decode._cache_size() == 2  # with and without a mask as input


@settings(max_examples=10)
@given(points=st.integers(0, 12), box=st.booleans(), mask=st.booleans(), seed=st.integers(0, 99))
def test_bucket_padding_changes_nothing(model, image, points, box, mask, seed):
    parts = prompt(points, box, mask, seed)
    want = samlight_jax.predict(image, **parts, model=model, return_logits=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samlight_jax.prompts.BUCKETS", (1, 2, 4, 33))
        got = samlight_jax.predict(image, **parts, model=model, return_logits=True)
    for a, b in zip(want, got, strict=True):
        assert_close(a, b)


def test_a_label_of_minus_one_is_a_token_to_predict(model, image):
    one = samlight_jax.predict(image, [[30, 20]], [1], model=model)[2]
    padded = samlight_jax.predict(image, [[30, 20], [0, 0]], [1, -1], model=model)[2]
    assert np.abs(one - padded).max() > 1e-3


def ragged(seed=0):
    """Two images' prompts, three each, of every kind, filled up with -1."""
    rng = np.random.default_rng(seed)
    coords = rng.uniform(0, 40, (2, 3, 2, 2))
    labels = np.array([[[1, 0], [1, -1], [-1, -1]], [[-1, -1], [0, 1], [-1, -1]]])
    boxes = np.array(
        [[[-1] * 4, [5, 5, 30, 30], [0, 0, 9, 9]], [[-1] * 4, [2, 3, 20, 21], [-1] * 4]]
    )
    masks = np.where(
        np.array([[1, 0, 1], [1, 0, 0]])[..., None, None], rng.normal(size=(2, 3, 16, 16)), -1
    )
    return coords, labels, boxes.astype(float), masks


def single(coords, labels, box, mask):
    """The same prompt as `predict` takes it; None where there is none."""
    here = labels != -1
    if not (here.any() or (box != -1).any() or (mask != -1).any()):
        return None
    return {
        "point_coords": coords[here] if here.any() else None,
        "point_labels": labels[here] if here.any() else None,
        "box": box if (box != -1).any() else None,
        "mask_input": mask[None] if (mask != -1).any() else None,
    }


@pytest.mark.parametrize("kind", ["list", "array", "jax"])
def test_a_ragged_batch_equals_single_calls(model, image, kind):
    images = [image, np.ascontiguousarray(image[::-1])]
    if kind == "list":
        images[1] = images[1][:30]
    coords, labels, boxes, masks = ragged()
    given_images = images if kind == "list" else np.stack(images)
    xp = jnp if kind == "jax" else np
    given_images = jnp.asarray(given_images) if kind == "jax" else given_images
    got = samlight_jax.predict_batch(
        given_images,
        *(xp.asarray(x) for x in (coords, labels, boxes, masks)),
        model=model,
        return_logits=True,
    )
    assert isinstance(got[0], list) == (kind == "list")
    assert got[1].shape == (2, 3, 3) and got[2].shape == (2, 3, 3, 16, 16)
    for i in range(2):
        for j in range(3):
            parts = single(coords[i, j], labels[i, j], boxes[i, j], masks[i, j])
            if parts is None:
                assert (got[0][i][j] < 0).all() and (got[1][i, j] == 0).all()
                continue
            one = jnp.asarray(images[i]) if kind == "jax" else images[i]
            want = samlight_jax.predict(one, **parts, model=model, return_logits=True)
            for a, b in zip(want, got, strict=True):
                assert_close(a, b[i][j])


def test_predict_batch_runs_under_jit(model, image):
    coords, labels, boxes, masks = (jnp.asarray(x, jnp.float32) for x in ragged())
    images = jnp.stack([jnp.asarray(image)] * 2)

    def run(*arguments):
        return samlight_jax.predict_batch(*arguments, model=model, return_logits=True)

    eager = run(images, coords, labels, boxes, masks)
    for a, b in zip(eager, jax.jit(run)(images, coords, labels, boxes, masks), strict=True):
        assert_close(a, b)


def test_a_batch_of_one_is_never_squeezed(model, image):
    masks, iou, low_res = samlight_jax.predict_batch(
        image[None], boxes=[[[5, 5, 30, 30]]], multimask_output=False, model=model
    )
    assert masks.shape == (1, 1, 1, HEIGHT, WIDTH)
    assert iou.shape == (1, 1, 1) and low_res.shape == (1, 1, 1, 16, 16)


BAD = [
    ({"point_coords": [[1, 2]]}, "Got `point_coords` without `point_labels`"),
    ({"point_labels": [1]}, "Got `point_labels` without `point_coords`"),
    ({"point_coords": [1, 2], "point_labels": [1]}, r"`point_coords` has shape \(2,\)"),
    ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"expected \(n, 2\)"),
    ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, "one label a point"),
    ({"point_coords": [[1, np.nan]], "point_labels": [1]}, "`point_coords` holds NaN or inf"),
    ({"point_coords": [[1, np.inf]], "point_labels": [-1]}, "`point_coords` holds NaN or inf"),
    ({"point_coords": [[1, 2]], "point_labels": [7]}, r"`point_labels` holds \[7"),
    ({"point_coords": [["a", 2]], "point_labels": [1]}, "`point_coords` is not an array of numb"),
    ({"box": [1, 2, 3]}, r"`box` has shape \(3,\)"),
    ({"box": [[1, 2, 3, 4]]}, r"`box` has shape \(1, 4\)"),
    ({"box": [30, 2, 30, 9]}, "is empty; expected x1, y1, x2, y2"),
    ({"box": [1, 9, 30, 2]}, "x1 < x2 and y1 < y2"),
    ({"box": [1, 2, np.nan, 9]}, "A box holds NaN"),
    ({"mask_input": np.zeros((16, 16))}, r"expected \(1, 256, 256\)"),
    ({"mask_input": np.zeros((2, 16, 16))}, "expected one mask"),
    ({"mask_input": np.zeros((1, 8, 8))}, r"expected \(16, 16\) low-resolution logits"),
    ({"mask_input": np.full((1, 16, 16), np.nan)}, "`mask_input` holds NaN"),
    ({"image_embedding": np.zeros((1, 256, 4, 4)), **BOX}, "jnp.moveaxis"),
]


@pytest.mark.parametrize(("parts", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
@pytest.mark.parametrize("where", ["host", "device"])
def test_bad_prompts_get_one_sentence(model, image, parts, sentence, where):
    if where == "device":
        parts = {
            k: jnp.asarray(v) if np.asarray(v).dtype.kind in "if" else v for k, v in parts.items()
        }
    with pytest.raises(InputError, match=sentence) as error:
        samlight_jax.predict(image, **parts, model=model)
    assert "\n" not in str(error.value)


def test_batches_that_do_not_fit_are_refused(model, image):
    run = samlight_jax.predict_batch
    for single in ("photo.png", image, jnp.asarray(image)):
        with pytest.raises(InputError, match=r"is a single image; .* write \[image\]"):
            run(single, boxes=np.ones((1, 1, 4)), model=model)
    with pytest.raises(InputError, match="`images` is empty"):
        run([], boxes=np.ones((0, 1, 4)), model=model)
    with pytest.raises(InputError, match="for 1 images; expected one"):
        run([image], boxes=np.ones((2, 1, 4)), model=model)
    with pytest.raises(InputError, match="for 1 images; expected one"):
        run([image], model=model)
    with pytest.raises(InputError, match="is empty; expected x1"):
        run([image], boxes=[[[9, 9, 3, 3]]], model=model)


def test_a_point_outside_warns_and_still_counts(model, image):
    with pytest.warns(UserWarning, match=r"outside the image: x=20, y=50 of 60x40"):
        samlight_jax.predict(image, [[20, 50]], [1], model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samlight_jax.predict(image, [[60, 40]], [1], model=model)


def test_a_single_bad_mask_of_many_is_found_under_no_trace_only(model, image):
    @jax.jit
    def run(box):
        return samlight_jax.predict(jnp.asarray(image), box=box, model=model)[1]

    assert run(jnp.array([30.0, 2, 30, 9])).shape == (3,)  # traced values cannot be checked
