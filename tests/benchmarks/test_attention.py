"""The benchmark of dilated attention: every row is there, and what a row says follows."""

import json
import re
import types

import jax.numpy as jnp
import pytest

from benchmarks import attention
from pallas_kernels import chain
from pallas_kernels.dilated_attention import reference
from pallas_kernels.shapes import SHAPES


def run(tmp_path, *arguments):
    """(exit code, report) of the program at a tiny size."""
    path = tmp_path / "attention.json"
    with pytest.raises(SystemExit) as end:
        attention.main(["--tiny", "--output", str(path), *arguments])
    return end.value.code, json.loads(path.read_text())


def test_every_row_is_timed_and_right_or_says_why_not(tmp_path):
    code, report = run(tmp_path)
    assert code == 0
    names = [*chain.CHAIN, "cudnn_dense", "unfused"]
    want = {(s, n, d) for s in attention.TINY for n in names for d in attention.DIRECTIONS}
    rows = {(r["shape"], r["implementation"], r["direction"]): r for r in report["rows"]}
    assert rows.keys() == want and len(report["rows"]) == len(want)
    assert report["jax"] and report["device"] and report["shapes"].keys() == attention.TINY.keys()
    for name, row in rows.items():
        if name[1] in ("reference", "unfused"):
            assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
            assert row["errors"].keys() == row["error_bounds"].keys()
            assert 0 < row["errors"]["out"] <= row["error_bounds"]["out"] < 0.1
            assert ("qkv" in row["errors"]) == (name[2] == "forward+backward")
            assert ("rel_w" in row["errors"]) == ("qkv" in row["errors"] and "window" in name[0])
            assert row["floor_ratio"] == pytest.approx(row["median_us"] / row["floor_us"], 1e-3)
            unfused = rows[name[0], "unfused", name[2]]
            ratio = unfused["median_us"] / row["median_us"]
            assert row["speed_up_over_unfused"] == pytest.approx(ratio, 1e-3)
            assert row["memory_mib"]["arguments"] > 0 and row["memory_mib"]["outputs"] > 0
        else:
            assert row.keys() & {"median_us", "refused"}, name


def test_a_wrong_back_end_is_not_timed(tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        out, lse = reference.run(*args, **kwargs)
        return out.at[-1, -1, -1, -1, -1].add(jnp.asarray(0.5, out.dtype)), lse

    module = types.SimpleNamespace(NAME="wrong", unsupported=lambda *_, **__: None, run=wrong)
    monkeypatch.setattr(chain, "CHAIN", {"wrong": module, "reference": reference})
    code, report = run(tmp_path, "--implementations", "wrong")
    assert code == 1 and len(report["rows"]) == 4
    for row in report["rows"]:
        assert re.match(r"AssertionError: out errs by 0\.(49|50)", row["failed"])
        assert "median_us" not in row


def test_a_back_end_that_breaks_leaves_the_others_their_rows(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug\nof two lines")

    module = types.SimpleNamespace(NAME="broken", unsupported=lambda *_, **__: None, run=broken)
    monkeypatch.setattr(chain, "CHAIN", {"broken": module, "reference": reference})
    code, report = run(tmp_path, "--implementations", "broken", "reference")
    assert code == 1
    for row in report["rows"]:
        if row["implementation"] == "broken":
            assert row["failed"] == "RuntimeError: a bug"
        else:
            assert row["median_us"] > 0


def test_what_comes_after_the_time_budget_is_skipped(tmp_path):
    code, report = run(tmp_path, "--time-budget", "0", "--implementations", "reference")
    assert code == 0
    assert {row["skipped"] for row in report["rows"]} == {"the time budget was spent."}


def test_floor_of_a_shape_bound_by_memory_and_of_one_by_arithmetic():
    limits = {"tflops": 800.0, "tb_s": 4.0}

    def floors(name):
        rows = [{"direction": d, "median_us": 100.0} for d in attention.DIRECTIONS]
        return [attention._rates(row, SHAPES[name], limits) for row in rows]

    numbers = 16 * 4096 * 384  # of one of q, k, v
    sums = 16 * 4096 * 3 * 4  # bytes of the log-sum-exp
    forward, both = floors("grid_r4_b16_3x128")
    assert forward["floor_us"] == pytest.approx((8 * numbers + sums) / 4e6, 1e-3)
    assert both["floor_us"] == pytest.approx((24 * numbers + 2 * sums) / 4e6, 1e-3)
    assert both["least_mib"] == pytest.approx((24 * numbers + 2 * sums) / 2**20, 1e-3)
    forward, both = floors("dense_b16_3x128")
    assert forward["floor_us"] == pytest.approx(4 * numbers * 4096 / 8e8, 1e-3)
    assert both["floor_us"] == pytest.approx(3.5 * forward["floor_us"], 1e-3)
    assert forward["tflops"] == pytest.approx(4 * numbers * 4096 / 1e8, 1e-3)
    assert forward["peak_share"] == pytest.approx(forward["tflops"] / 800, 1e-3)
