"""Kernels of a trace; tracing itself needs a GPU."""

import types

import jax
import pytest

from benchmarks import profile
from samlight_jax.errors import InputError


def plane(name, **lines):
    """Of lines, each {kernel: microseconds of each run}."""
    return types.SimpleNamespace(
        name=name,
        lines=[
            types.SimpleNamespace(
                name=line.replace("_", " "),
                events=[
                    types.SimpleNamespace(name=kernel, duration_ns=1e3 * us)
                    for kernel, runs in events.items()
                    for us in runs
                ],
            )
            for line, events in lines.items()
        ],
    )


def test_kernels_are_added_up_over_streams_and_the_longest_come_first():
    planes = [
        plane("/host:CPU", python={"call": [900.0]}),
        plane(
            "/device:GPU:0",
            Stream_1={"norm": [2.0, 3.0], "product": [40.0]},
            Stream_2={"norm": [1.0]},
            XLA_Ops={"product": [41.0]},
        ),
    ]
    found = profile.kernels(planes)
    assert list(found.items()) == [("product", [1, 40.0]), ("norm", [3, 6.0])]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match="expected a GPU"):
        profile._main(profile.Options())
    with pytest.raises(InputError, match=r"--calls 'all': expected some of \['encoder of 1'"):
        profile._main(profile.Options(calls=("all",)))
