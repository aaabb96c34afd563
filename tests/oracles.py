"""PyTorch references for the tests: segment-anything without torchvision, weights worth comparing.

Use inside tests: `oracles.segment_anything()` skips the test where torch or the package is absent.
"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path

import pytest

from samlight_jax.config import Pattern, SamConfig, ViTConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """A file of the workshop's shared folder; the test is skipped where there is none."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is absent")
    return SHARED / path


@functools.cache
def segment_anything():
    """PyPI's segment-anything 1.0; the four torchvision functions it needs are shimmed."""
    pytest.importorskip("torch")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        shim = _torchvision()
        sys.modules.update(shim)
        try:
            return pytest.importorskip("segment_anything")
        finally:  # others ask whether torchvision exists, and must see that it does not
            for name in shim:
                del sys.modules[name]
    return pytest.importorskip("segment_anything")


def _torchvision() -> dict[str, types.ModuleType]:
    modules = {
        name: types.ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.ops",
            "torchvision.ops.boxes",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
    }
    boxes = modules["torchvision.ops.boxes"]
    boxes.box_area, boxes.batched_nms = box_area, batched_nms
    functional = modules["torchvision.transforms.functional"]
    functional.to_pil_image, functional.resize = to_pil_image, resize
    return modules


def to_pil_image(array):
    """Torchvision's, for (height, width, 3) uint8."""
    from PIL import Image

    return Image.fromarray(array)


def resize(image, size):
    """Torchvision's, for a PIL image and (height, width): bilinear."""
    from PIL import Image

    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def box_area(boxes):
    """Torchvision's: areas of (n, 4) XYXY."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes, scores, idxs, iou_threshold):
    """Torchvision's: indices of the kept boxes, best first; only equal `idxs` compete."""
    import torch

    order = scores.argsort(descending=True, stable=True)
    area, keep = box_area(boxes), []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        iou = overlap / (area[best] + area[order] - overlap)
        order = order[(iou <= iou_threshold) | (idxs[order] != idxs[best])]
    return torch.stack(keep) if keep else torch.empty(0, dtype=torch.int64)


def randomise(module, seed: int, std: float = 0.05):
    """Redraws every parameter and float buffer; default-random SAM parity is vacuous.

    Scales of norms are drawn around 1, running variances are positive, the rest is N(0, std).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    norms = {
        f"{name}.weight".removeprefix(".")
        for name, child in module.named_modules()
        if "Norm" in type(child).__name__
    }
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or name in ("pixel_mean", "pixel_std"):
                continue
            draw = torch.randn(tensor.shape, generator=generator) * std
            if name.endswith("running_var"):
                draw = 1 + draw.abs()
            elif name in norms:
                draw = 1 + draw
            elif name.endswith(("gaussian_matrix", "positional_embedding")):
                draw = draw / std  # as SAM draws it
            tensor.copy_(draw)
    return module


TINY = SamConfig(
    name="tiny_sam",
    encoder=ViTConfig(
        width=32,
        depth=4,
        heads=2,
        attention=(Pattern(segment=(3, 3), attend_padding=True), Pattern()),
        rel_pos=True,
    ),
    image_size=80,
    decoder_mlp=64,
)


def tiny_sam(seed: int = 0):
    """segment-anything's `Sam` of the config `TINY`: a 5x5 grid in windows of 3; random weights."""
    sa = segment_anything()
    modeling = sa.modeling
    encoder = modeling.ImageEncoderViT(
        img_size=80,
        embed_dim=32,
        depth=4,
        num_heads=2,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1, 3),
        norm_layer=_layer_norm(),
    )
    prompts = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(5, 5), input_image_size=(80, 80), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=64)
    decoder = modeling.MaskDecoder(transformer_dim=256, transformer=transformer)
    return randomise(modeling.Sam(encoder, prompts, decoder).eval(), seed)


def _layer_norm():
    import torch

    return functools.partial(torch.nn.LayerNorm, eps=1e-6)


def tiny_hugging_face(seed: int = 0):
    """Hugging Face's `SamModel` of the same config; random weights of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 80,
            "window_size": 3,
            "global_attn_indexes": [1, 3],
            "mlp_dim": 128,
        },
        prompt_encoder_config={"image_size": 80},
        mask_decoder_config={"mlp_dim": 64},
    )
    return randomise(transformers.SamModel(config).eval(), seed)
