"""What `benchmarks.compare` times of PyTorch: SAM and MobileSAM's form, as their users run them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.compare_inputs import BOX, IMAGE, SIDE, TINY_SIDE, Call, cosine

MOST_COMPILED = 16  # photographs; torch.compile takes a minute for each shape


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
        self.grows = mode != "compile"  # measured at other sides too
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
        if self.mode == "compile" and batch > MOST_COMPILED:
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
        return cosine(*found)

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
