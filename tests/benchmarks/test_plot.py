"""The picture holds what the JSON says."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from benchmarks import attention, plot
from pallas_kernels import chain

FLOOR = "bound by memory and peak"


def row(shape, name, direction, tflops, floor_ratio):
    return {
        **{"shape": shape, "implementation": name, "direction": direction, "median_us": 1.0},
        **{"tflops": tflops, "floor_ratio": floor_ratio},
    }


REPORT = {
    **{"device": "NVIDIA H200", "jax": "0.11.2", "date": "2026-01-02"},
    "ceilings": {"tflops": 700.0, "tb_s": 4.0},
    "shapes": {"narrow": {}, "refused": {}, "wide": {}},
    "rows": [
        row("narrow", "triton", "forward", 100.0, 2.0),
        row("wide", "cudnn", "forward", 300.0, 2.0),
        row("wide", "triton", "forward", 400.0, 1.5),
        row("wide", "cudnn", "forward+backward", 150.0, 4.0),
        {"shape": "narrow", "implementation": "cudnn", "direction": "forward", "refused": "no."},
        {"shape": "refused", "implementation": "xla", "direction": "forward", "skipped": "late."},
    ],
}
DRAWN = {  # TFLOP/s and the line of the shape; "refused" has no time, so no line
    "forward": {
        "triton (ours)": [(100, 0), (400, 1)],
        "view + transposes + cuDNN": [(300, 1)],
        FLOOR: [(200, 0), (600, 1)],
    },
    "forward + backward": {"view + transposes + cuDNN": [(150, 1)], FLOOR: [(600, 1)]},
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """(the figure, the path of the file) of `REPORT`."""
    figures, subplots = [], plot.plt.subplots

    def kept(*args, **kwargs):
        figures.append(subplots(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(plot.plt, "subplots", kept)
    results, output = tmp_path / "attention.json", tmp_path / "images" / "attention.png"
    results.write_text(json.dumps(REPORT))
    plot.plot(results, output)
    ((figure, _),) = figures
    return figure, output


def test_draws_the_values_of_the_json(drawn):
    figure, _ = drawn
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    got = {
        title: {i.get_label(): [tuple(at) for at in i.get_offsets()] for i in panel.collections}
        for title, panel in panels.items()
    }
    assert got == DRAWN
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["narrow", "wide"]
    for panel in panels.values():
        (peak,) = panel.lines
        assert set(peak.get_xdata()) == {700}
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        assert left <= 0 < 700 <= right and top < 0 < 1 < bottom  # the first shape is on top
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == DRAWN["forward"].keys()
    for said in ("NVIDIA H200", "0.11.2", "2026-01-02"):
        assert said in figure.get_suptitle()


def test_the_file_is_a_png_with_the_colours_of_what_was_timed(drawn):
    _, output = drawn
    with Image.open(output) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    colours = {tuple(pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}

    def is_there(name):
        return tuple(round(255 * x) for x in to_rgb(plot.STYLES[name][1])) in colours

    names = plot.STYLES.keys() - {attention.UNFUSED}  # black, as the text is
    assert {name for name in names if is_there(name)} == {"triton", "cudnn"}


def test_every_back_end_that_is_timed_has_a_marker_of_its_own():
    timed = {*chain.CHAIN, attention.DENSE, attention.UNFUSED} - {"reference"}
    assert plot.STYLES.keys() == timed
    assert all(len(set(kind)) == len(timed) for kind in zip(*plot.STYLES.values(), strict=True))
