import json

import jax.numpy as jnp
import pytest

from pallas_kernels import device, tiles
from pallas_kernels.dilated_attention import groups, jax_triton, transforms, triton_kernels

H200 = device.Device("gpu", "NVIDIA H200", (9, 0))
CALL = transforms.Call(groups.fit((64, 64), (32, 64), (2, 1)), "all", 0.125, H200)
NOTHING = tiles.Tiles(0, 0, 0, 0)
CUTS = {
    "triton": triton_kernels.Cut(CALL, 6, 64, jnp.bfloat16, True, NOTHING),
    "jax_triton": jax_triton.Cut(CALL, 6, 64, jnp.dtype("bfloat16"), True, True, NOTHING),
}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles._entries.cache_clear()
    yield tmp_path
    tiles._entries.cache_clear()


def test_file_is_named_after_the_device(tuned):
    assert tiles.path("NVIDIA H200") == tuned / "nvidia_h200.json"
    assert tiles.path("NVIDIA A100-SXM4-80GB") == tuned / "nvidia_a100_sxm4_80gb.json"


def test_lookup_finds_what_was_tuned_and_nothing_else(tuned):
    config = {"block_q": 64, "block_k": 32, "num_warps": 4, "num_stages": 2}
    entries = {"triton/forward/k256_d64": {"config": config}}
    tiles.path("NVIDIA H200").write_text(json.dumps({"entries": entries}))
    assert tiles.lookup("NVIDIA H200", "triton", "forward", "k256_d64") == config
    assert tiles.lookup("NVIDIA H200", "triton", "dq", "k256_d64") is None
    assert tiles.lookup("NVIDIA L4", "triton", "forward", "k256_d64") is None


@pytest.mark.parametrize("implementation", CUTS)
def test_what_was_tuned_goes_before_the_candidates(tuned, implementation):
    cut, best, guess = CUTS[implementation], tiles.Tiles(64, 32, 4, 2), tiles.Tiles(16, 16, 8, 3)
    entry = {f"{implementation}/dq/bfloat16_d64_16x64_rel": {"config": vars(best)}}
    tiles.path(H200.kind).write_text(json.dumps({"entries": entry}))
    asked = []

    def candidates(*args):
        asked.append(args)
        return [guess, best]

    assert tiles.choose(implementation, "dq", cut, candidates) == best and not asked
    assert tiles.choose(implementation, "dkv", cut, candidates) == guess
    assert asked == [("dkv", cut)]
