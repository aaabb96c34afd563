import types

import jax
import pytest

from pallas_kernels.device import Device, assume, current

H200 = Device("gpu", "NVIDIA H200", (9, 0))


def test_assumed_device_holds_within_and_also_after_an_error():
    real = current()
    with assume(H200):
        assert current() == H200
        with pytest.raises(RuntimeError), assume(Device("tpu", "TPU v5")):
            assert current().platform == "tpu"
            raise RuntimeError
        assert current() == H200
    assert current() == real


def test_default_device_comes_before_the_first():
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert current() == Device("cpu", cpu.device_kind)


@pytest.mark.parametrize(
    ("text", "capability"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)]
)
def test_capability_is_cuda_s_alone(text, capability, monkeypatch):
    found = types.SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=text)
    monkeypatch.setattr(jax, "devices", lambda: [found])
    assert current() == Device("gpu", "a GPU", capability)
