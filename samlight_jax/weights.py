"""A model's arrays: files in and out, strict, whole or absent; building a model from them.

A file is one `.safetensors` with the config, format version, source and licence as metadata, or an
orbax directory with the same metadata in `samlight.json`. Batch norms are stored unfolded, so that
a file can be trained on and converted back to PyTorch bit for bit; they are folded at load. Arrays
may be stored in bfloat16; models start from them in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from samlight_jax.attention import group_shape, resize_rel_pos
from samlight_jax.config import SamConfig, ViTConfig
from samlight_jax.errors import InputError
from samlight_jax.image_encoder import resize_pos_embed
from samlight_jax.sam import Sam

FORMAT = "1"
ORBAX_METADATA = "samlight.json"


def expected(config: SamConfig, *, folded: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array that a model of this config holds, by name, without building it."""
    return values(_abstract(config, folded))


def values(model: Sam) -> dict[str, Any]:
    """The model's arrays by name."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {_name(path): leaf.get_value() for path, leaf in flat}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


class _OneKey(nnx.Rngs):
    """One key for all: tracing NNX's counted keys takes ten times as long as all the rest."""

    def __init__(self):
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=16)
def _abstract(config: SamConfig, folded: bool) -> Sam:
    """The model's structure; no array is made."""
    return nnx.eval_shape(lambda: Sam(config, folded=folded, rngs=_OneKey()))


def build(config: SamConfig, arrays: Mapping[str, np.ndarray], *, folded: bool = True) -> Sam:
    """A model with these arrays, by the names of `expected(config)`; folded for inference.

    Folded, it is in float32 at least, so that no product of folding is rounded; unfolded, in the
    arrays' own dtypes.

    Raises:
      InputError: names missing or unknown, or shapes that differ; all are listed.
    """
    _check(config, arrays)
    arrays = fold(widened(arrays)) if folded else arrays
    return replaced(_abstract(config, folded), lambda name, _: jax.numpy.asarray(arrays[name]))


def replaced(model: Sam, change: Callable[[str, Any], Any]) -> Sam:
    """A copy of the model with `change(name, array)` in place of each array."""
    graphdef, state = nnx.split(model)
    leaves = [
        (path, leaf.replace(change(_name(path), leaf.get_value())))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def cast(model: Sam, dtype: Any) -> Sam:
    """The model in another dtype; the frequencies of positions stay: bf16 would move points."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), parameters), rest)


def _check(config: SamConfig, arrays: Mapping[str, np.ndarray]) -> None:
    want = expected(config)
    problems = [f"missing {name} {want[name].shape}" for name in sorted(want.keys() - arrays)]
    problems += [f"unknown {name}" for name in sorted(arrays.keys() - want)]
    problems += [
        f"{name} is {arrays[name].shape}, expected {want[name].shape}"
        for name in sorted(want.keys() & arrays)
        if arrays[name].shape != want[name].shape
    ]
    if problems:
        raise InputError(
            f"These arrays are not a {config.name!r} ({len(problems)} problems): "
            + "; ".join(problems)
        )


def widened(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in float32, where a file keeps them in fewer bits."""
    return {n: x.astype(np.float32) if x.dtype.itemsize < 4 else x for n, x in arrays.items()}


def fold(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Folds every batch norm into the convolution before it (computed in float64)."""
    folded = {name: array for name, array in arrays.items() if ".bn." not in name}
    for name in arrays:
        if name.endswith(".bn.scale"):
            prefix = name.removesuffix("bn.scale")
            scale, bias, mean, var = (
                np.asarray(arrays[f"{prefix}bn.{part}"], np.float64)
                for part in ("scale", "bias", "mean", "var")
            )
            factor = scale / np.sqrt(var + 1e-5)
            kernel = arrays[f"{prefix}conv.kernel"]
            folded[f"{prefix}conv.kernel"] = (kernel * factor).astype(kernel.dtype)
            folded[f"{prefix}conv.bias"] = (bias - mean * factor).astype(kernel.dtype)
    return folded


def resize(
    config: SamConfig, arrays: Mapping[str, np.ndarray], image_size: int
) -> tuple[SamConfig, dict[str, np.ndarray]]:
    """Config and `widened` arrays for another `image_size`: position tables are interpolated."""
    resized = dataclasses.replace(config, image_size=image_size)
    arrays = widened(arrays)
    encoder = config.encoder
    if image_size == config.image_size or not isinstance(encoder, ViTConfig):
        return resized, arrays
    name = "image_encoder.pos_embed"
    arrays[name] = resize_pos_embed(arrays[name], resized.grid)
    for i in range(encoder.depth if encoder.rel_pos else 0):
        pattern = encoder.attention[i % len(encoder.attention)]
        for axis, keys in zip("hw", group_shape(pattern, resized.grid), strict=True):
            name = f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"
            arrays[name] = resize_rel_pos(arrays[name], keys)
    return resized, arrays


def arrays_of(model: Sam) -> dict[str, np.ndarray]:
    """The model's arrays by name, as numpy."""
    return {name: np.asarray(value) for name, value in values(model).items()}


def fingerprint(config: SamConfig, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the config and of the arrays' `checksum`: of what makes an embedding."""
    return hashlib.sha256((config.to_json() + checksum(arrays)).encode()).hexdigest()


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over every array's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    config: SamConfig,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model file, by the suffix of `path`: `.safetensors`, or else an orbax directory.

    Args:
      path: a file of that name is replaced; a directory is never.
      arrays: by the names of `expected(config)`.
      config: the model's.
      metadata: more entries, such as `source` and `licence`.

    Raises:
      InputError: the arrays are not this config's, or the directory exists.
    """
    path = Path(path)
    _check(config, arrays)
    header = {**(metadata or {}), "format": FORMAT, "config": config.to_json()}
    header["sha256"] = checksum(arrays)
    if path.is_dir():
        raise InputError(f"{path} exists and is a directory; remove it or choose another name.")
    if path.suffix == ".safetensors":
        write_safetensors(path, arrays, header)
        return

    def write(scratch: Path) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(scratch.resolve(), dict(arrays))
        files = json.dumps(_file_sizes(scratch))
        (scratch / ORBAX_METADATA).write_text(json.dumps({**header, "files": files}, indent=1))

    write_whole(path, write)


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> None:
    """Writes a .safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_whole(Path(path), lambda scratch: save_file(contiguous, scratch, dict(header)))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file or directory beside `path`, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        write(new)
        if new.is_file():  # some writers make it readable to its owner alone
            os.umask(umask := os.umask(0))
            new.chmod(0o666 & ~umask)
        os.replace(new, path)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], SamConfig, dict[str, str]]:
    """Reads a model file: (arrays by name, config, metadata).

    Raises:
      InputError: the file is missing, damaged, or not a model file of this package.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no model file {path}.")
    arrays, header = _read_orbax(path) if path.is_dir() else read_safetensors(path)
    if "config" not in header or header.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a model file of this package (format {header.get('format')!r}, "
            f"expected {FORMAT!r}); convert it with: python convert/from_torch.py {path} -o OUT"
        )
    try:
        config = SamConfig.from_json(header["config"])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if (found := checksum(arrays)) != header.get("sha256"):
        raise InputError(
            f"{path} is damaged: its arrays have the checksum {found[:12]}..., expected "
            f"{str(header.get('sha256'))[:12]}...; convert or download it again."
        )
    return arrays, config, header


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a .safetensors file.

    Raises:
      InputError: missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole .safetensors file ({error}). If it is a PyTorch checkpoint: "
            f"python convert/from_torch.py {path} -o model.safetensors; else get it again."
        ) from None


def _read_orbax(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import orbax.checkpoint as ocp

    try:
        header = json.loads((path / ORBAX_METADATA).read_text())
        config = SamConfig.from_json(header["config"])
        # Orbax itself would leave threads behind that go on failing, on stderr.
        wrong = json.loads(header["files"]).items() - _file_sizes(path).items()
        if wrong:
            raise ValueError("missing or cut: " + ", ".join(sorted(name for name, _ in wrong)))
        with ocp.StandardCheckpointer() as checkpointer:
            abstract = {n: np.empty(a.shape, a.dtype) for n, a in expected(config).items()}
            tree = checkpointer.restore(path.resolve(), abstract)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a whole model directory ({error}).") from error
    return {name: np.asarray(array) for name, array in tree.items()}, header


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
