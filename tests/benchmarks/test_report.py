"""The tables of attention and of the evaluation, from JSON of a few rows."""

import pytest

from benchmarks import report

WINDOW, GLOBAL, OTHER = "window16_b1_6x64", "sam_vit_h_global", "of_no_headline"


def timed(shape, name, forward, both=None, floor=4.0, mib=0.25):
    """A back end's rows of a shape: `forward` and, unless None, `both` microseconds."""
    return [
        {
            **{"shape": shape, "implementation": name, "direction": direction, "median_us": us},
            **{"floor_us": floor, "floor_ratio": us / floor, "memory_mib": {"temporary": mib}},
        }
        for direction, us in (("forward", forward), ("forward+backward", both))
        if us is not None
    ]


def refused(shape, name, why, key="refused"):
    return [
        {"shape": shape, "implementation": name, "direction": direction, key: why}
        for direction in ("forward", "forward+backward")
    ]


def values(*rows, shapes=(WINDOW, GLOBAL, OTHER)):
    return {
        **{"device": "NVIDIA H200", "jax": "0.11.2", "date": "2026-01-02"},
        "shapes": {shape: {"keys": 256 * 4**i} for i, shape in enumerate(shapes)},
        "rows": [row for some in rows for row in some],
    }


@pytest.fixture
def some():
    return values(
        timed(WINDOW, "mosaic_gpu", 8.0, 30.0),
        timed(WINDOW, "triton", 7.0, 20.0, mib=0.5),  # faster, but not what runs by default
        timed(WINDOW, "cudnn", 20.0, 45.0),
        timed(WINDOW, "unfused", 16.0, 60.0),
        refused(GLOBAL, "mosaic_gpu", "takes no relative positions."),
        timed(GLOBAL, "triton", 150.0, floor=100.0, mib=2.0),
        refused(GLOBAL, "cudnn", "would need the relative positions."),
        timed(GLOBAL, "unfused", 600.0, 2000.0, floor=100.0),
        timed(OTHER, "unfused", 9.0),
    )


def test_headlines(some):
    head, *rows = report.headlines(some)
    assert len(head) == 8
    assert rows == [
        [f"`{WINDOW}`", "mosaic_gpu", "4.0 us", "8.0 us", "2.00", "2.50", "30.0 us", "1.50"],
        [f"`{GLOBAL}`", "triton", "100 us", "150 us", "1.50", "4.00", "-", "-"],
    ]
    first, line, *_ = report.markdown(report.headlines, some).splitlines()
    assert first.startswith("| bf16, NVIDIA H200, jax 0.11.2, 2026-01-02 | kernel |")
    assert line == "|---" * 8 + "|"


def test_every_shape_and_back_end_that_was_timed(some):
    assert report.every_row("forward")(some) == [
        ("forward, us", "keys", "floor", "mosaic_gpu", "triton", "cudnn", "unfused", "MiB"),
        (f"`{WINDOW}`", "256", "4.0", "8.0", "7.0", "20.0", "16.0", "0.2"),
        (f"`{GLOBAL}`", "1024", "100.0", "-", "150.0", "-", "600.0", "2.0"),
        (f"`{OTHER}`", "4096", "4.0", "-", "-", "-", "9.0", "-"),
    ]
    assert report.every_row("forward+backward")(some) == [
        (
            *("forward + backward, us", "keys", "floor"),
            *("mosaic_gpu", "triton", "cudnn", "unfused", "MiB"),
        ),
        (f"`{WINDOW}`", "256", "4.0", "30.0", "20.0", "45.0", "60.0", "0.2"),
        (f"`{GLOBAL}`", "1024", "100.0", "-", "-", "-", "2000.0", "-"),
    ]


def test_refusals_are_gathered_by_back_end_and_sentence():
    names = [f"shape{i}" for i in range(7)]
    got = report.refusals(
        values(
            *(refused(name, "cudnn", "is too old.") for name in names),
            *(refused(name, "cudnn_dense", "is for dense attention.") for name in names[:2]),
            refused(names[0], "triton", "is too old."),
            refused(names[1], "xla", "the time budget was spent.", key="skipped"),
            timed(names[2], "xla", 1.0),
            shapes=names,
        )
    )
    assert got == [
        ("back end", "its sentence", "shapes"),
        ("`cudnn`", "is too old.", "7 of them"),
        ("`cudnn_dense`", "is for dense attention.", "`shape0`, `shape1`"),
        ("`triton`", "is too old.", "`shape0`"),
        ("`xla`", "the time budget was spent.", "`shape1`"),
    ]


def interval(value, half, n=10):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def evaluated(set_, protocol, value, half=0.01, **more):
    found = {"miou": interval(value, half), "boundary": interval(value / 2, half)}
    return {"set": set_, "protocol": protocol, "photographs": 5, **found, **more}


def evaluations(*rows):
    protocols = {
        "box": {"prompt": "box", "mask_select": "single", "refine": 0},
        "box-refine-1": {"prompt": "box", "mask_select": "single", "refine": 1},
        "box-refine-3": {"prompt": "box", "mask_select": "oracle", "refine": 3},
    }
    names = {row["protocol"] for row in rows}
    return {
        **{"date": "2026-01-02", "model": {"name": "minisam"}},
        "versions": {"device": "NVIDIA H200", "jax": "0.11.2"},
        "data": {row["set"]: {} for row in rows},
        "protocols": {name: fields for name, fields in protocols.items() if name in names},
        "rows": list(rows),
    }


def test_metrics_by_protocol_and_set():
    values = evaluations(
        evaluated("davis", "box", 0.5, 0.03),
        evaluated("polyp", "box", 0.8, 0.04),
        evaluated("davis", "box-refine-1", 0.61),
        evaluated("polyp", "box-refine-3", 0.9),
    )
    where = "minisam, NVIDIA H200, jax 0.11.2, 2026-01-02"
    sets = ["polyp (10)", "davis (10), out of domain", "mean of 2 sets"]
    assert report.by_set("miou")(values) == [
        [f"mIoU, {where}", "mask", *sets],
        # The mean's half width: the root of 0.03 and 0.04 squared, over 2.
        ["`box`", "single", "0.800 ±0.040", "0.500 ±0.030", "0.650 ±0.025"],
        ["`box-refine-1`", "single, 1 click", "-", "0.610 ±0.010", "-"],
        ["`box-refine-3`", "oracle, 3 clicks", "0.900 ±0.010", "-", "-"],
    ]
    head, box, *_ = report.by_set("boundary")(values)
    assert head[0] == f"boundary IoU, {where}" and box[2] == "0.400 ±0.040"


def test_average_precisions_where_there_are_any():
    ap = {name: 0.1 * k for k, name in enumerate(report.AP)} | {"AP_small": None, "AR1": 0.9}
    values = evaluations(
        evaluated("davis", "box", 0.5, ap=ap),
        evaluated("coco", "box", 0.5, ap=ap),
        evaluated("coco", "box-refine-1", 0.5),
    )
    head, *rows = report.average_precisions(values)
    assert head[1:6] == ("photographs", "instances", "AP", "AP50", "AP75")
    numbers = ("0.000", "0.100", "0.200", "-", "0.400", "0.500", "0.600")
    assert rows == [(f"{name}, `box`", "5", "10", *numbers) for name in ("coco", "davis")]


def test_agreement_is_the_worst_of_the_sets():
    def independent(n, difference, largest, beyond, other_points):
        found = {"n": n, "difference": difference, "largest": largest, "beyond": beyond}
        return {"independent": {**found, "other_points": other_points}}

    values = evaluations(
        evaluated("coco", "box", 0.5, **independent(3, -0.002, 0.01, 0, 0)),
        evaluated("davis", "box", 0.5, **independent(4, 0.001, 0.25, 1, 2)),
        evaluated("polyp", "box", 0.5),
        evaluated("polyp", "box-refine-1", 0.5),
    )
    _, row = report.agreement(values)
    assert row == ("`box`", "2", "7", "0.002000", "0.250000", "1", "2")


def test_arms():
    measures = ("agreement", "agreement_point", "agreement_token", "embedding_cosine")
    row = {name: [0.9, 0.88, 0.93] for name in measures}
    row |= {"flags": "--lr 1e-3", "passes": 23040, "seconds": 46.1}
    found = {"arms": {"one": row}, "device": "NVIDIA H200", "jax": "0.11.2", "date": "2026-01-02"}
    head, cells = report.arms(found)
    assert cells[:4] == ("one", "`--lr 1e-3`", "23,040", "46")
    assert len(head) == len(cells) and set(cells[4:]) == {"0.900 ±0.025"}
