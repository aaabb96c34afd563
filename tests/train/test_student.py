import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax import weights
from samlight_jax.config import PRESETS, Pattern, SamConfig, ViTConfig
from samlight_jax.errors import InputError
from tests.conftest import normal, run
from tests.models import TINY, random_arrays
from train import student
from train.config import TrainConfig

CONFIG = SamConfig(
    name="small",
    encoder=ViTConfig(
        width=32,
        depth=2,
        heads=2,
        attention=(Pattern(segment=(2, 2)), Pattern(segment=(4, 4), dilation=2)),
        stem="conv",
        local_conv=True,
    ),
    image_size=64,
    decoder_mlp=64,
)


# Configs.


def test_a_student_is_its_preset_with_changes():
    preset = PRESETS["samlight_t"]
    assert student.student_config(TrainConfig(), PRESETS["minisam"]) == preset
    run = TrainConfig(width=128, heads=2, depth=3, image_size=256)
    encoder = dataclasses.replace(preset.encoder, width=128, heads=2, depth=3)
    want = dataclasses.replace(preset, encoder=encoder, image_size=256, decoder_mlp=64)
    assert student.student_config(run, TINY) == want  # whose decoder it takes


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(student="samlight_x"), "There is no preset 'samlight_x'; expected one of"),
        (dict(student="minisam"), "'minisam' is no ViT; students are"),
        (dict(width=100), "This student cannot be: width=100 must be a multiple of heads=6."),
        (dict(image_size=8192), "This student cannot be: image_size=8192"),
    ],
)
def test_students_that_cannot_be(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        student.student_config(TrainConfig(**fields), TINY)


def test_a_student_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(CONFIG.to_json())
    found = student.student_config(TrainConfig(student=str(path), image_size=64), CONFIG)
    assert found == CONFIG
    path.write_text("{}")
    with pytest.raises(
        InputError, match=r"mine\.json cannot be read as a student: The model config"
    ):
        student.student_config(TrainConfig(student=str(path)), CONFIG)
    with pytest.raises(
        InputError, match=r"other\.json cannot be read as a student: .*No such file"
    ):
        student.student_config(TrainConfig(student=str(tmp_path / "other.json")), CONFIG)


# Where its arrays start.


def test_fresh_arrays_follow_from_the_seed():
    one, same, other = (student.fresh(CONFIG, seed) for seed in (0, 0, 1))
    shapes = {n: x.shape for n, x in weights.expected(CONFIG).items()}
    encoder = {n: shape for n, shape in shapes.items() if n.startswith("image_encoder.")}
    assert {n: x.shape for n, x in one.items()} == encoder
    for name, x in one.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, same[name])
        assert name.endswith("kernel") != np.array_equal(x, other[name])


def test_fresh_products_keep_the_variance():
    """By the inputs of one output; all else is where norms start."""
    found = {n.removeprefix("image_encoder."): x for n, x in student.fresh(CONFIG, 0).items()}
    inputs = {
        "patch_embed.conv1.conv": 4 * 4 * 3,
        "patch_embed.proj": 3 * 3 * 128,
        "blocks.0.attn.qkv": 32,
        "blocks.1.local_conv": 3 * 3,
        "blocks.1.mlp.lin2": 128,
        "neck.conv1": 32,
        "neck.conv2": 3 * 3 * 256,
    }
    for name, count in inputs.items():
        kernel = found[f"{name}.kernel"]
        error = 4 / (2 * kernel.size) ** 0.5  # four deviations of a deviation
        np.testing.assert_allclose(kernel.std(), count**-0.5, rtol=error)
        smaller = student.fresh(CONFIG, 0, 0.5)[f"image_encoder.{name}.kernel"]
        np.testing.assert_allclose(smaller, kernel * (0.5 if "blocks." in name else 1))
    for name, x in found.items():
        if not name.endswith("kernel"):
            assert np.all(x == name.endswith(("norm1.scale", "norm2.scale", "bn.scale", "bn.var")))


def test_the_decoder_is_the_teachers():
    own, theirs = random_arrays(CONFIG, 1), random_arrays(TINY, 2)
    found = student.with_decoder_of(own, theirs)
    assert found.keys() == own.keys()
    for name, x in found.items():
        assert x is (own if name.startswith("image_encoder.") else theirs)[name]


# What is matched.


def vit(depth):
    return {"patch_embed": 0, **{f"blocks.{i}": 0 for i in range(depth)}}


def tiny_vit():
    names = ["patch_embed"]
    for i, depth in enumerate((2, 2, 6, 2)):
        names += [f"layers.{i}.blocks.{j}" for j in range(depth)]
        names += [f"layers.{i}.downsample"] * (i < 3)
    return dict.fromkeys(names, 0)


@pytest.mark.parametrize(
    "own, theirs, want",
    [
        (6, vit(12), [f"blocks.{i}" for i in (1, 3, 5, 7, 9, 11)]),  # ViT-B
        (6, vit(24), [f"blocks.{i}" for i in (3, 7, 11, 15, 19, 23)]),  # ViT-L
        (12, vit(12), [f"blocks.{i}" for i in range(12)]),
        (8, vit(32), [f"blocks.{i}" for i in range(3, 32, 4)]),  # ViT-H
        (
            6,
            tiny_vit(),
            [f"layers.{i}" for i in ("0.blocks.1", "1.blocks.1", "2.blocks.1")]
            + [f"layers.{i}" for i in ("2.blocks.3", "2.blocks.5", "3.blocks.1")],
        ),
        (1, tiny_vit(), ["layers.3.blocks.1"]),
        (4, vit(2), ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]),
    ],
)
def test_blocks_are_matched_evenly(own, theirs, want):
    found = student.matched(vit(own), theirs)
    assert list(found) == [f"blocks.{i}" for i in range(own)]
    assert list(found.values()) == want


@pytest.mark.parametrize("many", [2, 12, 24, 32])
def test_steps_between_matches_differ_by_one_at_most(many):
    for own in range(2, 40):
        found = student.matched(vit(own), vit(many)).values()
        places = [int(name.split(".")[1]) for name in found]
        assert places[-1] == many - 1
        steps = np.diff(places if own > many else [-1, *places])
        assert steps.min() >= (own <= many) and np.ptp(steps) <= 1


def test_blocks_are_those_of_a_real_encoder():
    found = encode(random_arrays(CONFIG), normal(4, 64, 64, 3)).features
    assert student.blocks_of(found) == ["blocks.0", "blocks.1"]


def test_pooled_is_the_mean_of_a_tokens_cells():
    x = normal(2, 12, 12, 3)
    got = student.pooled(jnp.asarray(x), 4)
    for i in range(4):
        for j in range(4):
            cells = x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_allclose(got[:, i, j], cells.mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(student.pooled(x, 12), x)


@pytest.mark.parametrize("shape", [(1, 12, 12, 3), (1, 4, 4, 3), (1, 10, 20, 3)])
def test_maps_that_do_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match=f"A map of {shape[1]}x{shape[2]} does not divide"):
        student.pooled(np.zeros(shape), 5 if shape[1] == 12 else 10)


# Moments.


def test_moments_of_several_batches():
    rng = np.random.default_rng(0)
    maps = [
        (rng.normal(size=(b, 3, 5, 4)) * [0.01, 0.1, 1, 9] + [1, 0, -3, 2]).astype(np.float32)
        for b in (2, 3, 1)
    ]
    inside = [rng.random(x.shape[:3]) < 0.6 for x in maps]
    got = student.combined(list(map(student.moments, maps, inside)))
    tokens = np.concatenate([x[m] for x, m in zip(maps, inside, strict=True)]).astype(float)
    np.testing.assert_allclose(got.mean, tokens.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        got.deviation, tokens.std(0), rtol=1e-2
    )  # 0.01 about 1: digits cancel
    np.testing.assert_allclose(got.deviation[1:], tokens.std(0)[1:], rtol=1e-5)
    assert got.mean.dtype == got.deviation.dtype == np.float32


def test_a_constant_channel_has_a_deviation_above_zero():
    constant = np.full((1, 2, 2, 1), 3.1, np.float32)
    got = student.combined([student.moments(constant, np.ones((1, 2, 2), bool))])
    assert 0 < got.deviation[0] < 1e-2


# The encoder in training.


def test_cast_leaves_what_must_stay_wide():
    names = {
        *("image_encoder.neck.norm2.scale", "image_encoder.neck.norm2.bias"),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        *(f"image_encoder.patch_embed.conv{i}.bn.{s}" for i in (1, 2) for s in ("mean", "var")),
    }
    found = student.cast(random_arrays(CONFIG), jnp.bfloat16)
    assert {name for name, x in found.items() if x.dtype == np.float32} == names
    rest = {x.dtype for name, x in found.items() if name not in names}
    assert rest == {np.dtype(jnp.bfloat16)}


@functools.partial(
    jax.jit,
    static_argnames=("dtype", "remat"),
    compiler_options={"xla_backend_optimization_level": 0},  # compiles sooner
)
def program(arrays, pixels, dtype, remat):
    return student.encode(CONFIG, arrays, pixels, dtype=dtype, remat=remat)


def encode(arrays, pixels, dtype="float32"):
    return program(arrays, pixels, dtype, False)


def test_encoding_in_training_remembers_the_batch():
    """A tenth of the batch's mean and variance, as PyTorch's momentum of 0.1."""
    arrays, pixels = random_arrays(CONFIG), normal(4, 64, 64, 3)
    found = encode(arrays, pixels)
    prefix = "image_encoder.patch_embed.conv1."
    patches = pixels.reshape(4, 16, 4, 16, 4, 3).swapaxes(2, 3).reshape(-1, 4 * 4 * 3)
    outputs = patches @ arrays[f"{prefix}conv.kernel"].reshape(-1, 64)
    for part, batch in (("mean", outputs.mean(0)), ("var", outputs.var(0))):
        want = 0.9 * arrays[f"{prefix}bn.{part}"] + 0.1 * batch
        np.testing.assert_allclose(found.statistics[f"{prefix}bn.{part}"], want, atol=1e-5)
    assert found.statistics.keys() == {n for n in arrays if n.endswith((".bn.mean", ".bn.var"))}


def test_encoding_in_training_uses_the_batch():
    """With statistics of the batch in their place, inference gives what training gives."""
    arrays, pixels = random_arrays(CONFIG), normal(4, 64, 64, 3)
    found = encode(arrays, pixels)
    batch = {n: (x - 0.9 * arrays[n]) / 0.1 for n, x in found.statistics.items()}
    model = weights.build(CONFIG, {**arrays, **batch}, folded=False)
    want, features = run(model.image_encoder, jnp.asarray(pixels))
    np.testing.assert_allclose(found.embedding, want, atol=1e-3)
    assert np.std(want) > 0.1
    assert found.features.keys() == features.keys()
    other = encode({**arrays, **batch}, pixels)  # the running statistics do not matter
    np.testing.assert_allclose(other.embedding, found.embedding, atol=1e-5)


def test_remat_changes_neither_values_nor_gradients():
    arrays, pixels = random_arrays(CONFIG), jnp.asarray(normal(2, 64, 64, 3))
    trained = {n: x for n, x in arrays.items() if n.startswith("image_encoder.")}

    def loss(trained, remat):
        found = student.encode(CONFIG, {**arrays, **trained}, pixels, dtype="float32", remat=remat)
        # Through features and statistics too.
        rest = jax.tree.map(lambda x: jnp.mean(x**2), (found.features, found.statistics))
        return jnp.mean(found.embedding**3) + sum(jax.tree.leaves(rest)), found

    fast = {"xla_backend_optimization_level": 0}
    slope = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="remat")
    traced = [slope.trace(trained, remat=remat) for remat in (False, True)]
    assert ["remat" in str(one.jaxpr) for one in traced] == [False, True]
    plain, again = (one.lower().compile(fast)(trained) for one in traced)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    assert all(np.any(x) for n, x in plain[1].items() if n.endswith("kernel"))


def test_products_in_bfloat16_and_the_embedding_in_float32():
    arrays, pixels = random_arrays(CONFIG), normal(4, 64, 64, 3)
    found, want = encode(arrays, pixels, dtype="bfloat16"), encode(arrays, pixels)
    assert found.embedding.dtype == jnp.float32
    assert {x.dtype for x in found.features.values()} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in found.statistics.values()} == {np.dtype(np.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.03), found.statistics, want.statistics
    )
    error = np.abs(found.embedding - want.embedding)
    assert 1e-4 < error.mean() < 0.03  # bfloat16 has steps of 2**-8


# Projectors.


def test_projectors_are_linear_maps_to_the_teachers_channels():
    own = {"blocks.0": normal(1, 4, 4, 32), "blocks.1": normal(1, 4, 4, 32)}
    theirs = {"a": normal(1, 4, 4, 48), "b": normal(1, 8, 8, 20)}
    pairs = {"blocks.0": "a", "blocks.1": "b"}
    arrays = student.projectors(pairs, own, theirs, seed=0)
    assert {n: x.shape for n, x in arrays.items()} == {
        "projectors.blocks.0.kernel": (32, 48),
        "projectors.blocks.0.bias": (48,),
        "projectors.blocks.1.kernel": (32, 20),
        "projectors.blocks.1.bias": (20,),
    }
    np.testing.assert_allclose(arrays["projectors.blocks.0.kernel"].std(), 32**-0.5, rtol=0.1)
    arrays["projectors.blocks.1.bias"] += 3
    got = student.project(arrays, "blocks.1", jnp.asarray(own["blocks.1"]))
    want = own["blocks.1"] @ arrays["projectors.blocks.1.kernel"] + 3
    np.testing.assert_allclose(got, want, atol=1e-5)
    low = student.project(arrays, "blocks.1", jnp.asarray(own["blocks.1"], jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    again = student.projectors(pairs, own, theirs, seed=0)
    other = student.projectors(pairs, own, theirs, seed=1)
    name = "projectors.blocks.0.kernel"
    np.testing.assert_array_equal(again[name], arrays[name])
    assert not np.array_equal(other[name], arrays[name])
