"""`TinyViT` against plain functional PyTorch, written from the papers' description."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convert.apply import to_flax, to_torch
from samlight_jax import weights
from samlight_jax.config import PRESETS, SamConfig, TinyViTConfig
from tests import oracles
from tests.conftest import assert_parity, nchw, nhwc, normal, run

TINY = SamConfig(
    name="tiny",
    encoder=TinyViTConfig(
        widths=(8, 16, 24, 32), depths=(1, 2, 1, 2), heads=(1, 2, 3, 2), windows=(7, 7, 14, 7)
    ),
    image_size=64,
    decoder_mlp=64,
)


class Oracle:
    """TinyViT as functions; each weight is drawn where it is first used, by MobileSAM's name."""

    def __init__(self, config, seed=0):
        self.config, self.state = config, {}
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, name, *shape, std=0.3, mean=0.0):
        name = "image_encoder." + name
        if name not in self.state:
            self.state[name] = mean + std * torch.randn(shape, generator=self.rng)
        return self.state[name]

    def conv_bn(self, x, name, out, size, stride=1, groups=1):
        fan_in = x.shape[1] // groups * size**2
        w = self.draw(f"{name}.c.weight", out, x.shape[1] // groups, size, size, std=fan_in**-0.5)
        x = F.conv2d(x, w, stride=stride, padding=size // 2, groups=groups)
        scale = self.draw(f"{name}.bn.weight", out, mean=1)
        bias = self.draw(f"{name}.bn.bias", out)
        mean = self.draw(f"{name}.bn.running_mean", out)
        var = self.draw(f"{name}.bn.running_var", out, mean=2)
        return F.batch_norm(x, mean, var, scale, bias, eps=1e-5)

    def linear(self, x, name, out):
        w = self.draw(f"{name}.weight", out, x.shape[-1], std=x.shape[-1] ** -0.5)
        return F.linear(x, w, self.draw(f"{name}.bias", out))

    def norm(self, x, name, eps=1e-5):
        c = x.shape[-1:]
        scale, bias = self.draw(f"{name}.weight", *c, mean=1), self.draw(f"{name}.bias", *c)
        return F.layer_norm(x, c, scale, bias, eps)

    def inverted_bottleneck(self, x, name):
        wide = int(x.shape[1] * self.config.expand_ratio)
        y = F.gelu(self.conv_bn(x, f"{name}.conv1", wide, 1))
        y = F.gelu(self.conv_bn(y, f"{name}.conv2", wide, 3, groups=wide))
        return F.gelu(x + self.conv_bn(y, f"{name}.conv3", x.shape[1], 1))

    def merge(self, x, name, out, stride):
        y = F.gelu(self.conv_bn(x, f"{name}.conv1", out, 1))
        y = F.gelu(self.conv_bn(y, f"{name}.conv2", out, 3, stride, groups=out))
        return self.conv_bn(y, f"{name}.conv3", out, 1)

    def attend(self, window, name, heads):
        """One image's window (side, side, c), the plain way: no batch, a bias for each pair."""
        side, _, c = window.shape
        tokens = self.norm(window.reshape(-1, c), f"{name}.norm")
        packed = self.linear(tokens, f"{name}.qkv", 3 * c).reshape(-1, heads, 3 * c // heads)
        q, k, v = packed.split(c // heads, dim=-1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (c // heads) ** -0.5
        # A column of the table for each (|dy|, |dx|), numbered as pairs first appear.
        table = self.draw(f"{name}.attention_biases", heads, side * side, std=1.0)
        places = [(y, x) for y in range(side) for x in range(side)]
        column = {}
        index = [
            [column.setdefault((abs(y - b), abs(x - a)), len(column)) for b, a in places]
            for y, x in places
        ]
        scores = scores + table[:, torch.tensor(index)]
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(-1, c)
        return self.linear(out, f"{name}.proj", c).reshape(window.shape)

    def block(self, x, name, side, heads):
        _, c, h, w = x.shape
        padded = F.pad(nhwc(x), (0, 0, 0, -w % side, 0, -h % side))
        out = torch.zeros_like(padded)
        for i in range(len(x)):
            for top in range(0, padded.shape[1], side):
                for left in range(0, padded.shape[2], side):
                    at = (i, slice(top, top + side), slice(left, left + side))
                    out[at] = self.attend(padded[at], f"{name}.attn", heads)
        x = x + out[:, :h, :w].permute(0, 3, 1, 2)
        y = nhwc(self.conv_bn(x, f"{name}.local_conv", c, 3, groups=c))
        hidden = self.linear(
            self.norm(y, f"{name}.mlp.norm"), f"{name}.mlp.fc1", int(c * self.config.mlp_ratio)
        )
        return (y + self.linear(F.gelu(hidden), f"{name}.mlp.fc2", c)).permute(0, 3, 1, 2)

    def neck(self, x):
        w = self.draw("neck.0.weight", 256, x.shape[1], 1, 1, std=x.shape[1] ** -0.5)
        x = self.norm(nhwc(F.conv2d(x, w)), "neck.1", 1e-6).permute(0, 3, 1, 2)
        w = self.draw("neck.2.weight", 256, 256, 3, 3, std=1 / 48)
        return self.norm(nhwc(F.conv2d(x, w, padding=1)), "neck.3", 1e-6)

    def __call__(self, x):
        """(b, y, x, 3) to the embedding and the outputs of the parts by name, channels last."""
        c = self.config
        x = F.gelu(self.conv_bn(nchw(x), "patch_embed.seq.0", c.widths[0] // 2, 3, 2))
        outputs = {"patch_embed": (x := self.conv_bn(x, "patch_embed.seq.2", c.widths[0], 3, 2))}
        for i, stride in enumerate((2, 2, 1, None)):
            for j in range(c.depths[i]):
                name = f"layers.{i}.blocks.{j}"
                if i == 0:
                    x = self.inverted_bottleneck(x, name)
                else:
                    x = self.block(x, name, c.windows[i], c.heads[i])
                outputs[name] = x
            if stride:
                name = f"layers.{i}.downsample"
                outputs[name] = x = self.merge(x, name, c.widths[i + 1], stride)
        return self.neck(x), {name: nhwc(y) for name, y in outputs.items()}


@pytest.fixture(scope="module")
def tiny():
    """(oracle, our encoder folded, our encoder unfolded) of the same weights."""
    oracle = Oracle(TINY.encoder)
    oracle(normal(1, 64, 64, 3))
    rest = oracles.tiny_sam().state_dict()  # to_flax wants a whole model
    state = {name: a for name, a in rest.items() if not name.startswith("image_encoder.")}
    state = {name: tensor.numpy() for name, tensor in (state | oracle.state).items()}
    arrays = to_flax(state, TINY)
    return oracle, *(weights.build(TINY, arrays, folded=f).image_encoder for f in (True, False))


@pytest.mark.parametrize(
    "size, folded",
    [
        ((64, 64), True),  # maps of 8x8 and 4x4: padded windows
        ((64, 64), False),
        ((112, 112), True),  # 14x14 and 7x7: windows of 7 fit
        ((72, 104), True),  # 9x13 and 5x7
        ((31, 50), False),  # odd from the first convolution on: 4x7 and 2x4
    ],
    ids=str,
)
def test_tiny_vit_is_the_papers(tiny, size, folded):
    oracle, *models = tiny
    x = normal(2, *size, 3, seed=7)
    want, outputs = oracle(x)
    assert want.shape[1:3] == tuple(math.ceil(math.ceil(s / 4) / 4) for s in size)

    embedding, features = run(models[not folded], x)
    assert_parity(embedding, want)
    assert features.keys() == outputs.keys()
    for name, output in outputs.items():
        assert_parity(features[name], output)


def test_the_preset_has_just_the_weights_that_mobile_sam_has():
    config = PRESETS["mobile_sam"]
    oracle = Oracle(config.encoder)
    oracle(np.zeros((1, 32, 32, 3), np.float32))
    zeros = {name: np.zeros(a.shape, a.dtype) for name, a in weights.expected(config).items()}
    ours = {
        name: a.shape for name, a in to_torch(zeros, config).items() if "image_encoder." in name
    }
    assert ours == {name: tuple(tensor.shape) for name, tensor in oracle.state.items()}
