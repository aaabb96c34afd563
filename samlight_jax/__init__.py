"""Segment Anything, made light, in JAX: a photograph and a prompt in, masks out.

>>> import samlight_jax
>>> masks, iou, low_res = samlight_jax.predict(
...     "photo.jpg", point_coords=[[520, 380]], point_labels=[1])  # doctest: +SKIP
"""

from samlight_jax.automatic_mask_generator import SamAutomaticMaskGenerator
from samlight_jax.build_sam import build_sam, load, sam_model_registry
from samlight_jax.config import PRESETS, Pattern, SamConfig, TinyViTConfig, ViTConfig
from samlight_jax.errors import InputError
from samlight_jax.pipeline import encode, predict, predict_batch
from samlight_jax.predictor import SamPredictor
from samlight_jax.prompts import mask_to_input
from samlight_jax.sam import Sam

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "InputError",
    "Pattern",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamPredictor",
    "TinyViTConfig",
    "ViTConfig",
    "build_sam",
    "encode",
    "load",
    "mask_to_input",
    "predict",
    "predict_batch",
    "sam_model_registry",
]
