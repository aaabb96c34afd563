"""`samlight export`: a model's parts as files that run without this package's code.

StableHLO, by `jax.export`: one file for CPUs, CUDA and TPUs, loaded by JAX alone. Its attention is
the back end `xla`, the only one that runs on them all, in the steps that suit a CPU: on a GPU the
package's own kernels are faster. ONNX is written by the repository's convert/to_onnx.py, from the
same `Program`s; this package never imports `onnx`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from samlight_jax import weights
from samlight_jax.build_sam import DEFAULT, find
from samlight_jax.config import EMBEDDING, SamConfig, ViTConfig
from samlight_jax.errors import InputError
from samlight_jax.postprocess import LOW_RES
from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2 * 10**9  # bytes of weights: JAX warns beyond, and a file of jax.export ends at 2 GiB
TO_ONNX = Path(__file__).resolve().parents[1] / "convert" / "to_onnx.py"
What = Literal["encoder", "decoder"]


class Port(NamedTuple):
    """An input or output: a letter in its shape is a size chosen at each call."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


class Program(NamedTuple):
    """What is exported: `run(model, *inputs)` gives a tuple, one array for each of `outputs`."""

    name: str
    run: Callable[..., tuple[Any, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def frames(config: SamConfig) -> tuple[Port, ...]:
    """The inputs of `from_frames`."""
    s = config.image_size
    meaning = f"photographs, long side {s}, at the top left of a square frame; R, G, B"
    return (
        Port("frames", ("b", s, s, 3), "uint8", meaning),
        Port("sizes", ("b", 2), "int32", "height and width of each photograph in its frame"),
    )


def from_frames(frames: Any, sizes: Any) -> Any:
    """(b, s, s, 3) uint8 and the (b, 2) part of it that is photograph to `Sam.encode`'s pixels."""
    places = np.arange(frames.shape[1])
    rows, columns = (places < sizes[:, i : i + 1] for i in range(2))
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    return jnp.where(inside, (frames.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD, 0.0)


def encode(model: Sam, pixels: Any) -> Any:
    """`Sam.encode`'s embedding; a ViT takes a batch of unknown size image after image.

    Its attention goes in steps of bounded memory, whose number must be known.
    """
    if isinstance(model.config.encoder, ViTConfig) and not isinstance(pixels.shape[0], int):
        return jax.lax.map(lambda one: model.encode(one[None])[0][0], pixels)
    return model.encode(pixels)[0]


def encoder(config: SamConfig, *, uint8: bool = False) -> Program:
    """Pixels, or `frames`, to the image embedding; channels last."""
    s, g = config.image_size, config.grid
    meaning = "normalised as in docs/preprocessing.md, then padded with zeros; R, G, B"
    given = frames(config) if uint8 else (Port("pixels", ("b", s, s, 3), "float32", meaning),)
    out = Port("image_embeddings", ("b", g, g, EMBEDDING), "float32", "for the decoder")

    def run(model: Sam, *inputs: Any) -> tuple[Any, ...]:
        return (encode(model, from_frames(*inputs) if uint8 else inputs[0]),)

    return Program("encoder_uint8" if uint8 else "encoder", run, given, (out,))


def prompts(coords: Any, labels: Any, masks: Any, has_mask: Any) -> Prompts:
    """The prompts of one image; a label below -1 marks a slot that holds nothing."""
    return Prompts(coords, labels, labels >= -1, masks, has_mask)


def decoder(config: SamConfig) -> Program:
    """Embeddings, each with q prompts of n points, to low-resolution logits and predicted IoU."""
    g, m = config.grid, LOW_RES * config.grid

    def run(model: Sam, *inputs: Any) -> tuple[Any, ...]:
        return jax.lax.map(lambda one: model.decode(one[0], prompts(*one[1:])), inputs)

    meaning = (
        "1 foreground, 0 background, 2 and 3 a box's corners, -1 SAM's padding token (one at (0, "
        "0) goes with every prompt that has points and no box), -2 nothing"
    )
    where = f"x, y in the frame of {config.image_size} pixels"
    return Program(
        "decoder",
        run,
        (
            Port("image_embeddings", ("b", g, g, EMBEDDING), "float32", "of the encoder"),
            Port("point_coords", ("b", "q", "n", 2), "float32", where),
            Port("point_labels", ("b", "q", "n"), "int32", meaning),
            Port("mask_input", ("b", "q", m, m), "float32", "low-resolution logits, or zeros"),
            Port("has_mask_input", ("b", "q"), "bool", "whether mask_input counts"),
        ),
        (
            Port("low_res_masks", ("b", "q", 4, m, m), "float32", "logits: the single mask, three"),
            Port("iou_predictions", ("b", "q", 4), "float32", "of each mask, as predicted"),
        ),
    )


def sized(ports: tuple[Port, ...], sizes: Mapping[str, int]) -> tuple[Port, ...]:
    """The ports with these letters replaced by sizes."""
    return tuple(p._replace(shape=tuple(sizes.get(str(d), d) for d in p.shape)) for p in ports)


def specs(ports: tuple[Port, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes to trace with, symbolic where they hold letters."""
    scope = jax.export.SymbolicScope()
    return tuple(
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(",".join(map(str, port.shape)), scope=scope), port.dtype
        )
        for port in ports
    )


def examples(program: Program, model: Sam) -> list[np.ndarray]:
    """Inputs to time and compare with: one image, one prompt, two points."""
    rng, s = np.random.default_rng(0), model.config.image_size
    below = {"frames": 256, "sizes": s, "point_coords": s}
    return [
        rng.uniform(0, below.get(port.name, 2), tuple(map(int, port.shape))).astype(port.dtype)
        for port in sized(program.inputs, {"b": 1, "q": 1, "n": 2})
    ]


def stablehlo(program: Program, model: Sam) -> jax.export.Exported:
    """The program with the model's weights, for all of `PLATFORMS`.

    Raises:
      InputError: the weights exceed `LARGEST`, or JAX has no CPU to trace for.
    """
    of_encoder = program.name.startswith("encoder")
    size = sum(
        array.nbytes
        for name, array in weights.values(model).items()
        if name.startswith("image_encoder.") == of_encoder
    )
    if size > LARGEST:
        raise InputError(
            f"The {program.name} of {model.config.name!r} takes {size:,} bytes, more than the "
            f"{LARGEST:,} that a file of jax.export holds; use --format onnx, which writes weights "
            "beside it."
        )
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise InputError(
            f"JAX offers no CPU ({str(error).splitlines()[0]}), for which a portable file is "
            "traced; add cpu to JAX_PLATFORMS."
        ) from None
    with jax.default_device(cpu):  # the kernels of other devices refuse, `xla` takes every call
        function = jax.jit(lambda *inputs: program.run(model, *inputs))
        return jax.export.export(function, platforms=PLATFORMS)(*specs(program.inputs))


def describe(
    program: Program, config: SamConfig, arrays: Mapping[str, np.ndarray], **more: Any
) -> dict[str, Any]:
    """What is written beside an export, and what `weights.fingerprint` says of its weights."""
    import samlight_jax

    return {
        "program": program.name,
        "model": config.name,
        "config": json.loads(config.to_json()),
        "fingerprint": weights.fingerprint(config, arrays),
        "inputs": [port._asdict() for port in program.inputs],
        "outputs": [port._asdict() for port in program.outputs],
        "versions": {"samlight-jax": samlight_jax.__version__, "jax": jax.__version__},
        **more,
    }


def write(output: Path, content: bytes, facts: Mapping[str, Any]) -> None:
    """Writes an export and, beside it, its description: `output` with .json appended."""
    facts = {**facts, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(facts, indent=1)
    weights.write_whole(output, lambda scratch: scratch.write_bytes(content))
    beside = output.with_name(output.name + ".json")
    weights.write_whole(beside, lambda scratch: scratch.write_text(text))


def target(output: Path | None, default: str) -> Path:
    """The file to write; refused before the work where it is a folder."""
    if output is not None and output.is_dir():
        raise InputError(f"--output {output} is a folder; give --output the name of a file.")
    return output or Path(default)


def parse_batch(batch: str) -> dict[str, int]:
    """`--batch` as sizes for `sized`: none for "dynamic"."""
    if batch == "dynamic":
        return {}
    if not batch.isdecimal() or not int(batch):
        raise InputError(f"--batch {batch}: expected dynamic, or a whole number from 1 on.")
    return {"b": int(batch)}


def report(
    output: Path, seconds: float, run: Callable[[], Any], program: Program, model: Sam
) -> None:
    """Prints an export's size, its times on this machine, and how far it is from the model.

    Args:
      output: the file.
      seconds: that its making took.
      run: runs what the file holds on `examples`, and waits for it.
      program: what was exported.
      model: what it was exported from.
    """
    times, got = [], ()
    for _ in range(6):
        start = time.perf_counter()
        got = run()
        times.append(time.perf_counter() - start)
    want = jax.jit(program.run)(model, *examples(program, model))
    error = max(float(np.abs(a - np.asarray(b)).max()) for a, b in zip(got, want, strict=True))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, made in {seconds:.1f} s")
    print(
        f"first run {times[0]:.2f} s, then {1e3 * float(np.median(times[1:])):.1f} ms; differs by "
        f"{error:.1e} at most"
    )


def export(
    *,
    what: What,
    model: str = DEFAULT,
    format: Literal["stablehlo", "onnx"] = "stablehlo",
    batch: Annotated[str, tyro.conf.arg(metavar="dynamic|N")] = "dynamic",
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    uint8: tyro.conf.FlagCreatePairsOff[bool] = False,
    low_res: tyro.conf.FlagCreatePairsOff[bool] = False,
    single_mask: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Exports a model's encoder or decoder to a file that runs without this package.

    StableHLO gives low-resolution logits, for JAX on a CPU, CUDA or TPU; ONNX has the names of
    SAM's own export and needs this project's repository and its extra `onnx`.

    Args:
      what: encoder or decoder.
      model: a model file, or the name of one (see `samlight models`).
      format: stablehlo or onnx.
      batch: images in a call of the encoder or of StableHLO's decoder, prompts in a call of
        ONNX's decoder: dynamic, or a number.
      output: the file; by default MODEL_PROGRAM.FORMAT in this folder.
      uint8: the encoder takes bytes and the photographs' sizes, and normalises them itself.
      low_res: ONNX's decoder gives low-resolution logits only, and takes no orig_im_size.
      single_mask: ONNX's decoder gives the one mask that SAM's rule picks, not all four.
    """
    if uint8 and what != "encoder":
        raise InputError("--uint8 is the encoder's; drop it, or ask for --what encoder.")
    if format == "onnx":
        flags = {"--uint8": uint8, "--low-res": low_res, "--single-mask": single_mask}
        command = ["--what", what, "--model", model, "--batch", batch]
        command += ["--output", str(output)] if output else []
        return _to_onnx(command + [flag for flag, on in flags.items() if on])
    if low_res or single_mask:
        raise InputError(
            "--low-res and --single-mask are for --format onnx; drop them: StableHLO's decoder "
            "always gives all masks in low resolution."
        )
    sizes = parse_batch(batch)
    arrays, config, _ = weights.read(find(model))
    program = encoder(config, uint8=uint8) if what == "encoder" else decoder(config)
    program = program._replace(
        inputs=sized(program.inputs, sizes), outputs=sized(program.outputs, sizes)
    )
    output = target(output, f"{config.name}_{program.name}.stablehlo")
    start, sam = time.perf_counter(), weights.build(config, arrays)
    exported = stablehlo(program, sam)
    content = bytes(exported.serialize(vjp_order=0))
    facts = {"format": "stablehlo", "platforms": PLATFORMS, "attention": "xla"}
    facts["calling_convention_version"] = exported.calling_convention_version
    write(output, content, describe(program, config, arrays, **facts))
    seconds = time.perf_counter() - start
    loaded = jax.jit(jax.export.deserialize(bytearray(output.read_bytes())).call)
    given = examples(program, sam)
    report(output, seconds, lambda: jax.block_until_ready(loaded(*given)), program, sam)


def _to_onnx(arguments: list[str]) -> None:
    """Runs convert/to_onnx.py, a program of its own: `onnx` stays out of this package."""
    if not TO_ONNX.exists():
        raise InputError(
            f"--format onnx is written by convert/to_onnx.py, which is not at {TO_ONNX}: install "
            "this package from its repository (pip install -e '.[onnx]')."
        )
    if importlib.util.find_spec("onnx") is None:
        raise InputError("--format onnx needs onnx, which is not installed: pip install onnx")
    code = subprocess.run([sys.executable, str(TO_ONNX), *arguments]).returncode
    if code:
        raise SystemExit(code)
