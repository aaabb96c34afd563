import json

import pytest

from pallas_kernels import tiles


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
