"""Tuning, with kernels in Pallas's interpreter."""

import json

import pytest

from pallas_kernels import autotune, device, tiles
from pallas_kernels.dilated_attention import triton
from pallas_kernels.shapes import SHAPES, Shape

TINY = Shape(batch=1, size=(8, 8), segment=(4, 4), heads=1, head_dim=16, rel=True)
KEY = "bfloat16_d16_4x4_rel"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty tuned/, a single tiny shape, and a device that interprets."""
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    monkeypatch.setattr(autotune, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(autotune.measure, "sets_beyond_cache", lambda _: 2)
    tiles._entries.cache_clear()
    with device.assume(device.Device("gpu", "NVIDIA H200", (9, 0), interpret=True)):
        yield tmp_path
    tiles._entries.cache_clear()


def test_the_best_of_the_candidates_is_what_a_call_then_takes(folder, monkeypatch):
    times = iter((30.0, 10.0, 20.0) * 3)

    def timed(job, chains, seconds):
        program = job.result()  # it compiles
        assert program(chains[0]) is not None
        return {"us": next(times)}

    monkeypatch.setattr(autotune, "_timed", timed)
    found = [tiles.Tiles(16, 16, warps, stages) for warps, stages in ((4, 3), (8, 2), (4, 2))]
    monkeypatch.setattr(triton, "candidates", lambda *_: found)
    other = {"entries": {"triton/forward/other": {"config": {"block_q": 1}}}}
    tiles.path("NVIDIA H200").write_text(json.dumps(other))
    autotune.main([])
    report = json.loads((folder / "nvidia_h200.json").read_text())
    assert report["device"] == "NVIDIA H200" and report["jax"]
    names = {f"triton/{kernel}/{KEY}" for kernel in autotune.KERNELS}
    assert report["entries"].keys() == names | {"triton/forward/other"}
    tiles._entries.cache_clear()
    for kernel in autotune.KERNELS:
        entry = report["entries"][f"triton/{kernel}/{KEY}"]
        assert entry["us"] == 10 and entry["shape"] == "tiny"
        assert [x["us"] for x in entry["candidates"]] == [30, 10, 20]
        cut = autotune._cut(TINY)
        assert tiles.choose("triton", kernel, cut, triton.candidates) == found[1]


def test_each_candidate_is_timed_with_its_own_tiles(folder):
    found = autotune.tune(TINY, most=1, seconds=0)
    for kernel in autotune.KERNELS:
        entry = found[f"triton/{kernel}/{KEY}"]
        assert 0 < entry["p10_us"] <= entry["us"] <= entry["p90_us"]
        (only,) = entry["candidates"]
        assert only["config"] == entry["config"]


def test_a_candidate_that_fails_says_why_and_another_is_taken(folder, monkeypatch):
    good = triton.candidates("forward", autotune._cut(TINY))[0]
    bad = tiles.Tiles(0, 0, 4, 2)
    monkeypatch.setattr(triton, "candidates", lambda *_: [good, bad])
    entry = autotune.tune(TINY, seconds=0)[f"triton/forward/{KEY}"]
    assert entry["config"]["block_q"] == good.block_q
    assert list(entry["candidates"][1]) == ["config", "error"]


def test_shapes_that_share_a_key_are_tuned_once():
    with device.assume(device.Device("gpu", "NVIDIA H200", (9, 0))):
        found = autotune.representatives(list(SHAPES))
        assert "window16_b16_6x64" in found and "window16_b1_6x64" not in found
        keys = {tiles.key(autotune._cut(shape)) for shape in SHAPES.values()}
    assert len(found) == len(keys)


def test_what_is_used_wins_within_only():
    with tiles.use("triton", "dq", {"block_q": 7}):
        assert tiles.lookup("none", "triton", "dq", "any") == {"block_q": 7}
        assert tiles.lookup("none", "triton", "dkv", "any") is None
    assert tiles.lookup("none", "triton", "dq", "any") is None
