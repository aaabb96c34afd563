"""What `benchmarks.compare` times: this package's models, and its peers as their users run them.

Times do not depend on the weights: where a model's own are not at hand they are random, the same
for a float32 copy that the embedding is held against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.compare_inputs import BOX, IMAGE, SIDE, TINY_SIDE, Call, cosine, photograph
from benchmarks.compare_torch import Torch


class Ours:
    """A model of this package.

    Args:
      name: of a preset; its weights where they are there, else random ones.
      dtype: of parameters and products.
      tiny: at a small side.

    Attributes:
      options: of XLA: cuBLAS, which computes bias and GELU within a product, rather than Triton.
    """

    def __init__(self, name: str, dtype: str, *, tiny: bool):
        import jax

        self.options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
        self.jax, self.side = jax, TINY_SIDE if tiny else SIDE
        self.exhausted = jax.errors.JaxRuntimeError
        self.name, self.dtype, self.result = name, dtype, None
        self.exact = self._built(self.side)
        self.grows = self.trained  # measured at other sides too; random models take long to make
        self.model = self._cast(self.exact)

    def _built(self, side: int) -> Any:
        import samlight_jax

        try:
            model, self.trained = samlight_jax.load(self.name, image_size=side), True
        except samlight_jax.InputError:
            model, self.trained = samlight_jax.build_sam(self.name, image_size=side), False
        return model

    def _cast(self, model: Any) -> Any:
        from samlight_jax import weights

        return weights.cast(model, self.dtype)

    def described(self) -> dict[str, Any]:
        """What it is, its size and its encoder's arithmetic."""
        from samlight_jax import weights
        from train.start import flops_of

        arrays = weights.arrays_of(self.exact)
        parts = {name: sum(x.size for n, x in arrays.items() if n.startswith(name))
                 for name in ("image_encoder", "mask_decoder", "prompt_encoder")}  # fmt: skip
        return {
            "framework": f"jax {self.jax.__version__}",
            "dtype": self.dtype,
            "mode": "jit",
            "parameters": sum(parts.values()),
            "encoder_parameters": parts["image_encoder"],
            "encoder_flops": flops_of(self.exact),
        }

    def wait(self) -> None:
        """Until the last call has ended."""
        self.jax.block_until_ready(self.result)

    def _call(self, function: Any, given: Any, *args: Any) -> Call:
        """A call of a jitted function of a model's arrays and more."""
        run = self._jit(function)

        def call() -> None:
            # While an earlier result is kept, the next lies elsewhere, and XLA rewrites its graphs.
            self.result = None
            self.result = run(given, *args)

        return call

    def _jit(self, function: Any) -> Any:
        return self.jax.jit(
            lambda model, *args: function(model.model(), *args), compiler_options=self.options
        )

    def encoder(self, batch: int, side: int) -> Call:
        """A call that encodes a batch of normalised squares."""
        return self._call(_embed, *self._to_encode(batch, side))

    def _to_encode(self, batch: int, side: int) -> tuple[Any, Any]:
        """An encoder's arrays, and a batch of squares of its side."""
        from samlight_jax.flat import ENCODER, flat

        model = self.model if side == self.side else self._cast(self._built(side))
        return flat(model, ENCODER), self.jax.numpy.zeros((batch, side, side, 3), self.dtype)

    def memory_mib(self) -> float:
        """Of the encoder of one image: arguments, result and what lies between, as compiled."""
        compiled = self._jit(_embed).lower(*self._to_encode(1, self.side)).compile()
        sizes = compiled.memory_analysis()
        parts = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.temp_size_in_bytes
        return round(sum(parts) / 2**20, 1)

    def parity(self) -> float:
        """The cosine of the embedding's tokens to the float32 model's, the mean."""
        return cosine(*(np.asarray(self._embedding(m)) for m in (self.model, self.exact)))

    def mask_parity(self) -> float | None:
        """The mean IoU of the masks of 100 points with float32's; None with random weights."""
        import samlight_jax
        from train.metrics import mask_iou

        if not self.trained:
            return None
        place = (np.arange(10) + 0.5) * self.side / 10
        points = np.stack(np.meshgrid(place, place), axis=-1).reshape(1, 100, 1, 2)
        given = points, np.ones((1, 100, 1), np.int32)
        photo = photograph(self.side)[None]
        with self.jax.default_matmul_precision("highest"):
            ours, exact = (
                np.asarray(
                    samlight_jax.predict_batch(photo, *given, multimask_output=False, model=m)[0]
                )[0, :, 0]
                for m in (self.model, self.exact)
            )
        found = mask_iou((ours & exact).sum((1, 2)), (ours | exact).sum((1, 2)))
        return float(f"{found.mean():.6g}")

    def _embedding(self, model: Any) -> Any:
        import samlight_jax

        with self.jax.default_matmul_precision("highest"):
            return samlight_jax.encode(IMAGE, model=model)

    def predict(self, prompts: int) -> Call:
        """From a uint8 image on the device to masks there, with boxes."""
        import samlight_jax
        from samlight_jax.flat import flat

        jnp = self.jax.numpy
        image, boxes = jnp.asarray(IMAGE), jnp.asarray(np.tile(BOX, (1, prompts, 1)))

        def run(model: Any, image: Any, boxes: Any) -> Any:
            return samlight_jax.predict_batch(
                image[None], boxes=boxes, multimask_output=False, model=model
            )[:2]

        return self._call(run, flat(self.model), image, boxes)

    def prompts(self, prompts: int) -> Call:
        """Low-resolution masks of boxes on an embedding that is there."""
        from samlight_jax import prompts as prompts_
        from samlight_jax.flat import DECODER, flat
        from samlight_jax.preprocess import Frame

        jnp, config = self.jax.numpy, self.model.config
        frame = Frame(IMAGE.shape[:2], self.side)
        boxes = np.tile(BOX, (prompts, 1))
        given = self.jax.tree.map(
            jnp.asarray,
            prompts_.assemble(frame, config, prompts, None, None, boxes, None, absent=False),
        )
        embedding = jnp.zeros((config.grid, config.grid, 256), self.dtype)
        parts = flat(self.model, DECODER)
        return self._call(lambda model, *args: model.decode(*args), parts, embedding, given)


def _embed(model: Any, pixels: Any) -> Any:
    return model.encode(pixels)[0]


def _ours(name: str, dtype: str) -> Callable[..., Any]:
    return functools.partial(Ours, name, dtype)


def _torch(name: str, dtype: str, mode: str = "eager") -> Callable[..., Any]:
    return functools.partial(Torch, name, dtype, mode)


SUBJECTS: dict[str, Callable[..., Any]] = {
    "samlight_t": _ours("samlight_t", "bfloat16"),
    "samlight_t, float32": _ours("samlight_t", "float32"),
    "samlight_t_paper": _ours("samlight_t_paper", "bfloat16"),
    "minisam": _ours("minisam", "bfloat16"),
    "sam_vit_b": _ours("sam_vit_b", "bfloat16"),
    "sam_vit_h": _ours("sam_vit_h", "bfloat16"),
    "torch mobile_sam": _torch("mobile_sam", "float16"),
    "torch mobile_sam, CUDA graph": _torch("mobile_sam", "float16", "graph"),
    "torch mobile_sam, compiled": _torch("mobile_sam", "float16", "compile"),
    "torch sam_vit_b": _torch("sam_vit_b", "float32"),
    "torch sam_vit_b, bfloat16": _torch("sam_vit_b", "bfloat16"),
    "torch sam_vit_b, compiled": _torch("sam_vit_b", "bfloat16", "compile"),
    "torch sam_vit_h": _torch("sam_vit_h", "float32"),
    "torch sam_vit_h, bfloat16": _torch("sam_vit_h", "bfloat16"),
    "torch sam_vit_h, compiled": _torch("sam_vit_h", "bfloat16", "compile"),
}
