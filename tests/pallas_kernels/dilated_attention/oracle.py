"""The definition of dilated attention, written as loops over tokens."""

import itertools

import numpy as np


def attend(q, k, v, segment, dilation, offsets, scale, rel_h=None, rel_w=None):
    """The definition, token by token, in float64; q, k, v are (H, W, heads, d)."""
    (sh, sw), (rh, rw) = segment, dilation
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)

    def place(y, x):
        residue = y % sh % rh, x % sw % rw
        return (y // sh, x // sw, *residue), residue

    tokens = list(np.ndindex(q.shape[:2]))
    for (y, x), h in itertools.product(tokens, range(q.shape[2])):
        group, residue = place(y, x)
        if offsets == "per_head" and residue != divmod(h % (rh * rw), rw):
            continue
        keys = [key for key in tokens if place(*key)[0] == group]
        scores = np.array([scale * q[y, x, h] @ k[i, j, h] for i, j in keys])
        if rel_h is not None:
            scores += [rel_h[y, x, h, i % sh // rh] + rel_w[y, x, h, j % sw // rw] for i, j in keys]
        weights = np.exp(scores)  # small scores only: nothing to subtract
        lse[y, x, h] = np.log(weights.sum())
        out[y, x, h] = sum(w * v[i, j, h] for w, (i, j) in zip(weights, keys, strict=True))
        out[y, x, h] /= weights.sum()
    return out, lse
