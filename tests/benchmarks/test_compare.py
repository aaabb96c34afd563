"""What is timed and kept; the times themselves are a device's."""

import json
import subprocess

import pytest

from benchmarks import compare, compare_subjects
from samlight_jax.errors import InputError


class Fake:
    """A subject whose calls are counted."""

    side, exhausted, grows = 64, MemoryError, True

    def __init__(self, *, tiny):
        self.tiny, self.called, self.waited = tiny, 0, 0

    def described(self):
        return {"framework": "none", "encoder_parameters": 7}

    def parity(self):
        return 1.0

    def mask_parity(self):
        return None

    def memory_mib(self):
        return 3.5

    def wait(self):
        self.waited += 1

    def call(self):
        self.called += 1

    def encoder(self, batch, side):
        return self.call if side <= 128 else None

    def predict(self, prompts):
        return self.call if prompts == 1 else None

    def prompts(self, prompts):
        return None


def test_a_row_holds_what_a_subject_can_do():
    row = compare.measured(Fake(tiny=True), tiny=True)
    assert row["encoder_parameters"] == 7 and row["memory_mib"] == 3.5
    assert list(row["encoder_ms_per_image"]) == [1, 16] and list(row["side_ms"]) == [64, 128]
    assert list(row["predict_ms"]) == [1] and row["prompts_ms"] == {}
    assert row["encoder_latency_ms"] > 0


def test_what_does_not_fit_is_none():
    subject = Fake(tiny=True)

    def full():
        raise MemoryError

    subject.encoder = lambda batch, side: subject.call if batch == 1 else full
    row = compare.measured(subject, tiny=True)
    assert row["encoder_ms_per_image"][1] > 0 and row["encoder_ms_per_image"][16] is None


def test_latency_waits_for_every_call_and_throughput_for_a_row(monkeypatch):
    monkeypatch.setattr(compare, "SPEND", 0.001)
    for timed, calls in ((compare.latency, 1), (compare.throughput, 10)):
        subject = Fake(tiny=True)
        assert timed(subject.call, subject.wait) > 0
        assert subject.called - 3 == calls * (subject.waited - 2)


def test_rows_of_other_subjects_stay_and_failures_are_written(tmp_path, monkeypatch):
    path = tmp_path / "compare.json"
    machine = {"device": "NVIDIA X", "date": "today"}
    path.write_text(json.dumps({**machine, "rows": {"sam_vit_b": {"kept": 1}, "gone": {}}}))
    monkeypatch.setattr(compare, "_child", lambda code: json.dumps(machine))

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="Trace\nNoCuda: none")

    monkeypatch.setattr(compare.subprocess, "run", run)
    compare._main(compare.Options(subjects=("minisam",), output=path))
    rows = json.loads(path.read_text())["rows"]
    assert list(rows.items()) == [
        ("minisam", {"date": "today", "failed": "NoCuda: none"}),
        ("sam_vit_b", {"kept": 1}),  # in the order of SUBJECTS, which has no "gone"
    ]
    with pytest.raises(InputError, match="--subjects nobody: expected some of samlight_t"):
        compare._main(compare.Options(subjects=("nobody",)))


@pytest.mark.slow
def test_a_model_of_ours_is_measured_on_a_cpu():
    subject = compare_subjects.SUBJECTS["samlight_t, float32"](tiny=True)
    assert subject.described()["encoder_flops"] > 1e9 and subject.memory_mib() > 40
    for call in (subject.encoder(2, subject.side), subject.predict(1), subject.prompts(2)):
        call()
        subject.wait()
    logits, iou = subject.result
    assert logits.shape == (2, 4, 64, 64) and iou.shape == (2, 4)
