"""Program: this project's model file -> a PyTorch checkpoint with Meta's (MobileSAM's) names.

Run: `python convert/to_torch.py sam_vit_b.safetensors -o sam_vit_b.pth`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

if __name__ == "__main__":  # run uninstalled: only this file's folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.apply import report, to_torch
from samlight_jax import weights
from samlight_jax.config import SamConfig, TinyViTConfig
from samlight_jax.errors import InputError, exit_on_error

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def convert(
    model: tyro.conf.Positional[Path],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
) -> None:
    """Converts this project's model file to a PyTorch checkpoint with Meta's names.

    Args:
      model: a file or orbax folder that convert/from_torch.py or train/ wrote.
      output: *.pth, *.pt or *.bin (torch.save), or *.safetensors.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"-o {output}: expected a name that ends in {', '.join(SUFFIXES)}.")
    arrays, config, _ = weights.read(model)
    state = to_torch(weights.widened(arrays), config)
    unused = unused_by_sam(state, config)
    write({**state, **unused}, output)
    print(f"{output}: {config.name}, from {model}")
    if unused:
        print(f"{len(unused)} arrays of zeros added, which SAM never uses but MobileSAM's strict")
        print("load expects: TinyViT's ImageNet classifier and the batch norms' counters")
    print(report(arrays))


def unused_by_sam(state: Mapping[str, np.ndarray], config: SamConfig) -> dict[str, np.ndarray]:
    """The keys of MobileSAM's `TinyViT` that a model of ours lacks, as zeros."""
    if not isinstance(config.encoder, TinyViTConfig):
        return {}
    width, classes = config.encoder.widths[-1], 1000
    shapes = {"norm_head.weight": (width,), "norm_head.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    zeros: dict[str, np.ndarray] = {}
    zeros |= {f"image_encoder.{name}": np.zeros(s, np.float32) for name, s in shapes.items()}
    for name in state:
        if name.endswith(".bn.running_var"):
            zeros[name.removesuffix("running_var") + "num_batches_tracked"] = np.zeros((), np.int64)
    return zeros


def write(state: Mapping[str, np.ndarray], output: Path) -> None:
    """Writes a PyTorch checkpoint, whole or not at all."""
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    if output.suffix == ".safetensors":
        metadata = {"format": "pt"}
        weights.write_whole(output, lambda scratch: save_file(tensors, scratch, metadata))
    else:
        weights.write_whole(output, lambda scratch: torch.save(tensors, scratch))


def main() -> None:
    """The command line."""
    tyro.cli(convert)


if __name__ == "__main__":
    exit_on_error(main)
