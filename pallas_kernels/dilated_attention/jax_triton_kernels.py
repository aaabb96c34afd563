"""The Triton kernels of `jax_triton`: forward, the gradient of q, those of k and v.

`cut` holds the `Constants` that `jax_triton.Cut` makes. A *slot* is a place in a
group's list of queries or keys; it holds a token, or none: at the list's end, in padding of the
map, or where a row of keys is rounded up to a power of two (`cut.pitch`). Head vectors are tuples
of parts, each a power of two wide.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Of a maximum before its first key: finite, since -inf less -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Constants:
    """Numbers that Triton compiles in, read as attributes; hashable."""

    def __init__(self, **values):
        self.items = tuple(sorted(values.items()))
        vars(self).update({name: tl.constexpr(value) for name, value in values.items()})

    def __eq__(self, other):
        return isinstance(other, Constants) and self.items == other.items

    def __hash__(self):
        return hash(self.items)

    def __repr__(self):  # becomes a part of the names of functions, which differ in nothing else
        return "cut"


@triton.jit
def _program(tiles: tl.constexpr, cut: tl.constexpr):
    """What this program owns; tiles of one head are neighbours, then heads, then groups.

    Returns:
      Its tile; whether the head attends here; the group's first token, as (its place in the
      batch, the head, y, x); the group's first element of a log-sum-exp.
    """
    program = tl.program_id(0)
    head = program // tiles % cut.heads
    group = program // (tiles * cut.heads)
    residue = group % cut.residues
    place = group // cut.residues
    segment = place % cut.segments
    y = segment // cut.segments_across * cut.segment_h + residue // cut.dilation_w
    x = segment % cut.segments_across * cut.segment_w + residue % cut.dilation_w
    # Offsets within one image fit 32 bits, no others.
    image = (place // cut.segments).to(tl.int64) * (cut.height * cut.width)
    origin = image + y * cut.width + x, head, y, x
    if cut.own:
        row = place.to(tl.int64) * cut.heads + head
        return program % tiles, residue == head % cut.residues, origin, row * cut.tokens
    else:
        row = group.to(tl.int64) * cut.heads + head
        return program % tiles, tl.full((), True, tl.int1), origin, row * cut.tokens


@triton.jit
def _places(start, block: tl.constexpr, pitch: tl.constexpr, cut: tl.constexpr):
    """How far the tokens of the slots from `start` lie from the group's first token.

    Returns:
      Two terms, a number and (block,); the second is the same for every tile where it can be.
    """
    slot = tl.arange(0, block)
    step = cut.dilation_h * cut.width
    if block % pitch == 0:  # whole rows
        return start // pitch * step, slot // pitch * step + slot % pitch * cut.dilation_w
    elif pitch % block == 0:  # within a row
        return start // pitch * step + start % pitch * cut.dilation_w, slot * cut.dilation_w
    else:
        slot += start
        return start * 0, slot // pitch * step + slot % pitch * cut.dilation_w


@triton.jit
def _real(start, origin, block: tl.constexpr, pitch: tl.constexpr, cut: tl.constexpr):
    """(block,), which slots hold a token of the map."""
    slot = start + tl.arange(0, block)
    row, column = slot // pitch, slot % pitch
    inside = (row < cut.rows) & (column < cut.columns)
    if cut.ragged:
        inside &= origin[2] + row * cut.dilation_h < cut.height
        inside &= origin[3] + column * cut.dilation_w < cut.width
    return inside


@triton.jit
def _queries(start, origin, cut: tl.constexpr):
    """Places of a tile of queries, and which are real."""
    places = _places(start, cut.block_q, cut.columns, cut)
    if cut.masked_q:
        return places, _real(start, origin, cut.block_q, cut.columns, cut)
    else:  # a mask that the compiler takes away
        return places, tl.full((cut.block_q,), True, tl.int1)


@triton.jit
def _keys(start, origin, cut: tl.constexpr):
    """Places of a tile of keys, and which are real."""
    places = _places(start, cut.block_k, cut.pitch, cut)
    if cut.masked_k:
        return places, _real(start, origin, cut.block_k, cut.pitch, cut)
    else:  # a mask that the compiler takes away
        return places, tl.full((cut.block_k,), True, tl.int1)


@triton.jit
def _pointers(ptr, places, real, i: tl.constexpr, stride: tl.constexpr, cut: tl.constexpr):
    """(block, width) pointers to part `i` of the head vectors, and their mask."""
    start: tl.constexpr = i * cut.width0
    width: tl.constexpr = cut.width1 if i else cut.width0
    column = start + tl.arange(0, width)
    at = ptr + places[0] * stride + (places[1][:, None] * stride + column[None, :])
    mask = tl.broadcast_to(real[:, None], at.shape)
    if start + width > cut.head_dim:
        mask &= column[None, :] < cut.head_dim
    return at, mask


@triton.jit
def _load(ptr, places, real, stride: tl.constexpr, cut: tl.constexpr):
    """The head vectors at `places`, in parts; 0 where there is none."""
    parts = ()
    for i in tl.static_range(cut.parts):
        at, mask = _pointers(ptr, places, real, i, stride, cut)
        parts += (tl.load(at, mask=mask, other=0.0),)
    return parts


@triton.jit
def _store(ptr, places, real, parts, factor, stride: tl.constexpr, cut: tl.constexpr):
    """Undoes `_load`, times `factor`, a number or one for each token."""
    for i in tl.static_range(cut.parts):
        at, mask = _pointers(ptr, places, real, i, stride, cut)
        tl.store(at, (parts[i] * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(block: tl.constexpr, cut: tl.constexpr):
    parts = (tl.full((block, cut.width0), 0.0, tl.float32),)
    if cut.width1:
        parts += (tl.full((block, cut.width1), 0.0, tl.float32),)
    return parts


@triton.jit
def _over_parts(x, y, cut: tl.constexpr):
    """`x @ y.T` over the whole head."""
    total = tl.dot(x[0], y[0].T, input_precision=cut.precision)
    for i in tl.static_range(1, cut.parts):
        total = tl.dot(x[i], y[i].T, total, input_precision=cut.precision)
    return total


@triton.jit
def _add_product(sums, weights, x, fade, cut: tl.constexpr):
    """`sums * fade + weights @ x`; `fade` is one factor a row, or None for 1."""
    weights = weights.to(x[0].dtype)
    parts = ()
    for i in tl.static_range(cut.parts):
        total = sums[i]
        if fade is not None:
            total = total * fade[:, None]
        parts += (tl.dot(weights, x[i], total, input_precision=cut.precision),)
    return parts


@triton.jit
def _relative(ptr, places, real, number, size: tl.constexpr, cut: tl.constexpr):
    """Pointers (block, numbers) to the relative terms of queries, and their mask."""
    stride = cut.heads * size
    at = ptr + places[0] * stride + (places[1][:, None] * stride + number[None, :])
    return at, (number[None, :] < size) & real[:, None]


@triton.jit
def _load_relative(ptr, places, real, number, size: tl.constexpr, cut: tl.constexpr):
    """(block, numbers) relative terms, in units of `exp2`."""
    at, inside = _relative(ptr, places, real, number, size, cut)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _rows(start, cut: tl.constexpr):
    """The rows that a tile of keys holds, where there are relative terms."""
    return tl.arange(0, cut.block_k // cut.pitch) + start // cut.pitch


@triton.jit
def _end(slots: tl.constexpr, mine):
    """Where a loop over slots ends: at once, where the head does not attend."""
    return tl.where(mine, slots, 0)


@triton.jit
def _store_row(ptr, start, value, mine, cut: tl.constexpr):
    """Stores a number for each query, as the log-sum-exp is kept: only where the head attends."""
    slot = start + tl.arange(0, cut.block_q)
    tl.store(ptr + slot, value, mask=slot < _end(cut.tokens, mine))


@triton.jit
def _load_row(ptr, start, other: tl.constexpr, cut: tl.constexpr):
    """Undoes `_store_row`; `other` for what is no query."""
    slot = start + tl.arange(0, cut.block_q)
    return tl.load(ptr + slot, mask=slot < cut.tokens, other=other)


@triton.jit
def _load_lse(ptr, start, cut: tl.constexpr):
    """In units of `exp2`; +inf for -inf and for what is no query: so their weights are 0."""
    lse = _load_row(ptr, start, float("inf"), cut)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _logits(scores, bias, cut: tl.constexpr):
    """Scores, and a factor to units of `exp2`: left to a multiply-add where it can be."""
    if cut.rel:
        return scores * (cut.scale * LOG2E) + tl.reshape(bias, scores.shape), 1.0
    else:
        return scores, cut.scale * LOG2E


@triton.jit
def _bases(q_ptr, k_ptr, v_ptr, origin, cut: tl.constexpr):
    """Pointers to q, k and v of the group's first token; a packed array holds them in turn."""
    base = origin[0] * cut.stride + origin[1] * cut.head_dim
    return q_ptr + base, k_ptr + (base + cut.slot), v_ptr + (base + 2 * cut.slot)


@triton.jit
def _by_column(rel_w_ptr, element, queries, cut: tl.constexpr):
    """(queries, columns) relative terms, the same for every tile of keys; 0 without."""
    if cut.rel:
        ptr = rel_w_ptr + element * cut.columns
        column = tl.arange(0, cut.pitch)
        return _load_relative(ptr, queries[0], queries[1], column, cut.columns, cut)
    else:
        return 0.0


@triton.jit
def _scores(q, k, keys, start, rel_h_ptr, by_column, queries, cut: tl.constexpr):
    """(queries, keys) of a tile of keys, and their factor; -inf for keys that are none."""
    bias = None
    if cut.rel:
        rows = _rows(start, cut)
        by_row = _load_relative(rel_h_ptr, queries[0], queries[1], rows, cut.rows, cut)
        bias = by_row[:, :, None] + by_column[:, None, :]
    scores, factor = _logits(_over_parts(q, k, cut), bias, cut)
    return tl.where(keys[1][None, :], scores, float("-inf")), factor


@triton.jit
def forward(q_ptr, k_ptr, v_ptr, rel_h_ptr, rel_w_ptr, out_ptr, lse_ptr, cut: tl.constexpr):
    """The output and the log-sum-exp of a tile of queries."""
    tile, mine, origin, row = _program(cut.tiles_q, cut)
    queries = _queries(tile * cut.block_q, origin, cut)
    element = origin[0] * cut.heads + origin[1]
    q_ptr, k_ptr, v_ptr = _bases(q_ptr, k_ptr, v_ptr, origin, cut)
    rel_h_ptr += element * cut.rows
    q = _load(q_ptr, queries[0], queries[1], cut.stride, cut)
    by_column = _by_column(rel_w_ptr, element, queries, cut)
    top = tl.full((cut.block_q,), LOWEST, tl.float32)
    total = tl.full((cut.block_q,), 0.0, tl.float32)
    sums = _zeros(cut.block_q, cut)
    for start in range(0, _end(cut.slots_k, mine), cut.block_k):
        keys = _keys(start, origin, cut)
        k = _load(k_ptr, keys[0], keys[1], cut.stride, cut)
        scores, factor = _scores(q, k, keys, start, rel_h_ptr, by_column, queries, cut)
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_top[:, None])
        fade = tl.exp2(top - new_top)
        v = _load(v_ptr, keys[0], keys[1], cut.stride, cut)
        sums = _add_product(sums, weights, v, fade, cut)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
    nothing = total == 0  # every key at -inf
    total = tl.where(nothing, 1.0, total)
    out_ptr += element * cut.head_dim
    _store(out_ptr, queries[0], queries[1], sums, (1 / total)[:, None], cut.stride_out, cut)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN2)
    _store_row(lse_ptr + row, tile * cut.block_q, lse, mine, cut)


@triton.jit
def _start_backward(
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    start,
    element,
    mine,
    queries,
    cut: tl.constexpr,
):
    """Of a tile of queries: dout; the log-sum-exp; `delta`, which its ds have in common, stored."""
    offset = element * cut.head_dim
    dout = _load(dout_ptr + offset, queries[0], queries[1], cut.stride_out, cut)
    out = _load(out_ptr + offset, queries[0], queries[1], cut.stride_out, cut)
    delta = -_load_row(dlse_ptr, start, 0.0, cut)
    for i in tl.static_range(cut.parts):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    _store_row(delta_ptr, start, delta, mine, cut)
    lse = _load_lse(lse_ptr, start, cut)
    if cut.own:  # what was loaded is another group's
        lse = tl.where(mine, lse, float("inf"))
    return dout, lse[:, None], delta[:, None]


@triton.jit
def _add_relative(dby_column, dscores, drel_h_ptr, start, queries, cut: tl.constexpr):
    """Adds a tile's ds to the sums of columns; stores those of its rows, which it holds whole."""
    apart = tl.reshape(dscores, (cut.block_q, cut.block_k // cut.pitch, cut.pitch))
    at, inside = _relative(drel_h_ptr, queries[0], queries[1], _rows(start, cut), cut.rows, cut)
    tl.store(at, tl.sum(apart, 2).to(drel_h_ptr.dtype.element_ty), mask=inside)
    return dby_column + tl.sum(apart, 1)


@triton.jit
def backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    dq_ptr,
    delta_ptr,
    drel_h_ptr,
    drel_w_ptr,
    cut: tl.constexpr,
):
    """The gradients of a tile of queries; of a packed array, into the first third of dq_ptr."""
    tile, mine, origin, row = _program(cut.tiles_q, cut)
    queries = _queries(tile * cut.block_q, origin, cut)
    element = origin[0] * cut.heads + origin[1]
    dout, lse, delta = _start_backward(
        out_ptr,
        lse_ptr + row,
        dout_ptr,
        dlse_ptr + row,
        delta_ptr + row,
        tile * cut.block_q,
        element,
        mine,
        queries,
        cut,
    )
    q_ptr, k_ptr, v_ptr = _bases(q_ptr, k_ptr, v_ptr, origin, cut)
    rel_h_ptr += element * cut.rows
    q = _load(q_ptr, queries[0], queries[1], cut.stride, cut)
    by_column = _by_column(rel_w_ptr, element, queries, cut)
    end = _end(cut.slots_k, mine)
    if cut.rel:
        end = cut.slots_k  # where the head does not attend too, to store zeros
        dby_column = tl.full((cut.block_q, cut.pitch), 0.0, tl.float32)
    sums = _zeros(cut.block_q, cut)
    for start in range(0, end, cut.block_k):
        keys = _keys(start, origin, cut)
        k = _load(k_ptr, keys[0], keys[1], cut.stride, cut)
        v = _load(v_ptr, keys[0], keys[1], cut.stride, cut)
        scores, factor = _scores(q, k, keys, start, rel_h_ptr, by_column, queries, cut)
        dscores = tl.exp2(scores * factor - lse) * (_over_parts(dout, v, cut) - delta)
        sums = _add_product(sums, dscores, k, None, cut)
        if cut.rel:
            ptr = drel_h_ptr + element * cut.rows
            dby_column = _add_relative(dby_column, dscores, ptr, start, queries, cut)
    dq_ptr += origin[0] * cut.stride + origin[1] * cut.head_dim
    _store(dq_ptr, queries[0], queries[1], sums, cut.scale, cut.stride, cut)
    if cut.rel:
        ptr = drel_w_ptr + element * cut.columns
        column = tl.arange(0, cut.pitch)
        at, inside = _relative(ptr, queries[0], queries[1], column, cut.columns, cut)
        tl.store(at, dby_column.to(drel_w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_scores(k, q, start_k, rel_h_ptr, rel_w_ptr, queries, cut: tl.constexpr):
    """(keys, queries) of a tile of queries, and their factor."""
    bias = None
    if cut.rel:
        rows, columns = _rows(start_k, cut), tl.arange(0, cut.pitch)
        by_row = _load_relative(rel_h_ptr, queries[0], queries[1], rows, cut.rows, cut)
        by_column = _load_relative(rel_w_ptr, queries[0], queries[1], columns, cut.columns, cut)
        bias = by_row.T[:, None, :] + by_column.T[None, :, :]
    return _logits(_over_parts(k, q, cut), bias, cut)


@triton.jit
def backward_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    _dqkv_ptr,
    dk_ptr,
    dv_ptr,
    cut: tl.constexpr,
):
    """The gradients of a tile of keys and values; of a packed array, both into dk_ptr."""
    tile, mine, origin, row = _program(cut.tiles_k, cut)
    keys = _keys(tile * cut.block_k, origin, cut)
    element = origin[0] * cut.heads + origin[1]
    q_ptr, k_ptr, v_ptr = _bases(q_ptr, k_ptr, v_ptr, origin, cut)
    k = _load(k_ptr, keys[0], keys[1], cut.stride, cut)
    v = _load(v_ptr, keys[0], keys[1], cut.stride, cut)
    dout_ptr += element * cut.head_dim
    rel_h_ptr += element * cut.rows
    rel_w_ptr += element * cut.columns
    dk = _zeros(cut.block_k, cut)
    dv = _zeros(cut.block_k, cut)
    # Queries that are none have a q, dout and delta of 0 or a log-sum-exp of +inf: they add 0.
    # Keys that are none sum up anything, which is not stored.
    for start in range(0, _end(cut.tokens, mine), cut.block_q):
        queries = _queries(start, origin, cut)
        q = _load(q_ptr, queries[0], queries[1], cut.stride, cut)
        dout = _load(dout_ptr, queries[0], queries[1], cut.stride_out, cut)
        # (keys, queries), so that both sums take their left side from registers.
        scores, factor = _transposed_scores(
            k, q, tile * cut.block_k, rel_h_ptr, rel_w_ptr, queries, cut
        )
        weights = tl.exp2(scores * factor - _load_lse(lse_ptr + row, start, cut)[None, :])
        dv = _add_product(dv, weights, dout, None, cut)
        delta = _load_row(delta_ptr + row, start, 0.0, cut)[None, :]
        dscores = weights * (_over_parts(v, dout, cut) - delta)
        dk = _add_product(dk, dscores, q, None, cut)
    base = origin[0] * cut.stride + origin[1] * cut.head_dim
    if cut.slot:  # packed
        dv_ptr = dk_ptr
    _store(dk_ptr + (base + cut.slot), keys[0], keys[1], dk, cut.scale, cut.stride, cut)
    _store(dv_ptr + (base + 2 * cut.slot), keys[0], keys[1], dv, 1.0, cut.stride, cut)
