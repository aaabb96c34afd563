import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels.dilated_attention import groups

ONE_TO = {top: st.integers(1, top) for top in (3, 7)}


@st.composite
def grids(draw):
    dilation = (draw(ONE_TO[3]), draw(ONE_TO[3]))
    segment = (dilation[0] * draw(ONE_TO[3]), dilation[1] * draw(ONE_TO[3]))
    return groups.fit((draw(ONE_TO[7]), draw(ONE_TO[7])), segment, dilation)


def tokens(grid, heads=2):
    """(1, H, W, heads, 1), each entry its own number."""
    shape = (1, *grid.size, heads, 1)
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@pytest.mark.parametrize(
    ("size", "segment", "dilation", "clamped", "padded"),
    [
        ((64, 64), (16, 16), (1, 1), (16, 16), (64, 64)),
        ((64, 64), (14, 14), (1, 1), (14, 14), (70, 70)),
        ((64, 48), (128, 64), (4, 4), (64, 48), (64, 48)),
        ((13, 9), (16, 16), (4, 2), (16, 10), (16, 10)),  # up to whole dilations
        ((1, 17), (1, 16), (1, 4), (1, 16), (1, 32)),
    ],
)
def test_fit(size, segment, dilation, clamped, padded):
    grid = groups.fit(size, segment, dilation)
    assert (grid.segment, grid.padded) == (clamped, padded)


@hypothesis.settings(max_examples=50, derandomize=True)
@hypothesis.given(grids())
def test_counts(grid):
    (h, w), (sh, sw), (rh, rw) = grid.size, grid.segment, grid.dilation
    assert grid.segments == (len({y // sh for y in range(h)}), len({x // sw for x in range(w)}))
    assert grid.keys == sum(y % rh == x % rw == 0 for y in range(sh) for x in range(sw))
    grouped = groups.group(tokens(grid), grid)
    assert grouped.shape[1:3] == (np.prod(grid.segments), grid.residues)
    assert grouped.shape[4] == grid.keys


@hypothesis.settings(max_examples=50, derandomize=True)
@hypothesis.given(grids())
def test_group_follows_the_definition(grid):
    x = tokens(grid)
    got = groups.group(x, grid)
    (sh, sw), (rh, rw), (_, mw) = grid.segment, grid.dilation, grid.group
    across = grid.padded[1] // sw
    for y, z in itertools.product(*map(range, grid.size)):
        segment = y // sh * across + z // sw
        residue = y % sh % rh * rw + z % sw % rw
        place = y % sh // rh * mw + z % sw // rw
        np.testing.assert_array_equal(got[:, segment, residue, :, place], x[:, y, z])


@hypothesis.settings(max_examples=50, derandomize=True)
@hypothesis.given(grids())
def test_ungroup_undoes_group(grid):
    x = tokens(grid)
    np.testing.assert_array_equal(groups.ungroup(groups.group(x, grid), grid), x)


def test_own_residues_come_and_go():
    grid = groups.fit((4, 12), (4, 6), (2, 3))
    x = groups.group(tokens(grid, heads=8), grid)
    own = groups.take_own(x)
    back = np.asarray(groups.put_own(own, grid, -1))
    for head, residue in itertools.product(range(8), range(6)):
        if residue == head % 6:
            np.testing.assert_array_equal(own[:, :, 0, head], x[:, :, residue, head])
            np.testing.assert_array_equal(back[:, :, residue, head], x[:, :, residue, head])
        else:
            assert (back[:, :, residue, head] == -1).all()


def test_real_tokens():
    assert groups.real_tokens(groups.fit((8, 8), (4, 8), (2, 2)), 3) is None
    grid = groups.fit((3, 5), (4, 4), (2, 2))
    real = groups.real_tokens(grid, 3)
    assert real.shape == (1, 2, 4, 3, 4, 1)
    np.testing.assert_array_equal(groups.ungroup(real, grid), np.ones((1, 3, 5, 3, 1), bool))
    assert real.sum() == 3 * 5 * 3
