"""Kernels are switched off where they are asked; their times need a GPU."""

import json

import jax
import pytest

from benchmarks import ablation, compare
from pallas_kernels import chain, depthwise_norm
from samlight_jax.errors import InputError


def test_a_kernel_refuses_within_and_not_after():
    before = depthwise_norm.unsupported
    mosaic = chain.CHAIN["mosaic_gpu"]
    with ablation.without(("depthwise_norm", "dilated_attention.mosaic_gpu")):
        assert depthwise_norm.unsupported(None, None) == "is switched off."
        assert mosaic.unsupported() == "is switched off."
    assert depthwise_norm.unsupported is before


@pytest.mark.parametrize("part", ablation.CHANGES)
def test_every_change_names_a_kernel(part):
    for kernels, _ in ablation.CHANGES[part].values():
        with ablation.without(kernels):
            pass


def test_all_rows_are_written(tmp_path, monkeypatch):
    asked = []

    class Subject:
        side, exhausted, wait = 64, MemoryError, None

        def __init__(self, *_, **__):
            self.options = {"kept": 1}

        def encoder(self, batch, side):
            asked.append((batch, self.options))

        def prompts(self, count):
            asked.append((count, self.options))

    monkeypatch.setattr(ablation, "Ours", Subject)
    monkeypatch.setattr(compare, "throughput", lambda call, wait: 2.0)
    path = tmp_path / "ablation.json"
    ablation._main(ablation.Options(output=path, tiny=True))
    found = json.loads(path.read_text())
    for part, changes in ablation.CHANGES.items():
        assert found[part] == {change: {"1": 2.0, "2": 2.0} for change in changes}
    assert (1, {"kept": 1}) in asked
    assert (2, {"kept": 1, "xla_gpu_enable_command_buffer": ""}) in asked


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match="expected a GPU"):
        ablation._main(ablation.Options())
