import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax.draw import MASK
from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD
from samlight_jax.prompts import Prompts
from tests import models
from tests.conftest import normal
from train import objects, sheet
from train.augment import Views

GREY, FRAME, LOW_RES = 100, 256, 64
TINTED = (GREY + MASK) / 2
SIZES = [(256, 192), (128, 256)]
TEACHER = {"box": (8, 8, 24, 24), "point": (4, 16, 20, 40)}  # low-res y1, x1, y2, x2
STUDENT = {"box": (8, 8, 16, 24), "point": (4, 16, 20, 60)}


def grey_views():
    """Grey photographs, of two shapes."""
    pixels = np.zeros((2, FRAME, FRAME, 3), np.float32)
    for view, (height, width) in zip(pixels, SIZES, strict=True):
        view[:height, :width] = (GREY - PIXEL_MEAN) / PIXEL_STD
    return Views(pixels, np.array(SIZES))


def rectangles(places):
    """(b, 4, m, m): two boxes, two points, the second of each the larger."""
    masks = np.zeros((2, 4, LOW_RES, LOW_RES), bool)
    for i, kind in ((1, "box"), (3, "point")):
        top, left, bottom, right = places[kind]
        masks[:, i, top:bottom, left:right] = True
    masks[:, [0, 2], 1:3, 1:3] = True
    return masks


@pytest.fixture
def drawn(monkeypatch):
    """Draws a sheet of what is given, in place of two models' answers."""

    def draw(counts=True):
        coords = np.zeros((2, 4, 4, 2), np.float32)
        coords[:, 1, :2] = [[32, 32], [96, 96]]
        coords[:, 3, 0] = [100, 40]
        zeros = np.zeros((2, 4, 4), int)
        prompts = Prompts(coords, zeros, zeros > 0)
        single = np.tile([True, True, False, False], (2, 1))
        found = objects.Objects(prompts, rectangles(TEACHER), single, np.full((2, 4), counts))
        monkeypatch.setattr(sheet, "answers", lambda *_: (found, rectangles(STUDENT)))
        model = models.random_model()
        picture = sheet.make(models.TINY, {}, model, grey_views(), "step 7")
        assert picture.size[0] == len(sheet.HEADS) * (sheet.SIDE + sheet.GAP) + sheet.GAP
        return np.asarray(picture).astype(int)

    return draw


def pictures(image):
    """Each column's pixels that are of a photograph or a mask: (grey, tinted) counts."""
    found = []
    for column in range(len(sheet.HEADS)):
        left = sheet.GAP + column * (sheet.SIDE + sheet.GAP)
        part = image[:, left : left + sheet.SIDE]
        grey, tinted = (abs(part - level).max(-1) <= 3 for level in (GREY, TINTED))
        found.append((grey.sum(), tinted.sum()))
    return np.array(found)


def area(place, size):
    """Share of a view that a low-resolution rectangle covers, which ends where the view does."""
    height, width = size
    top, left, bottom, right = 4 * np.array(place)
    return (min(bottom, height) - top) * (min(right, width) - left) / (height * width)


def test_a_sheet_shows_photographs_and_both_models_masks(drawn):
    image = drawn()
    shown = [(sheet.SIDE * h / 256) * (sheet.SIDE * w / 256) for h, w in SIZES]
    grey, tinted = pictures(image).T
    np.testing.assert_allclose(grey[0], sum(shown), rtol=0.02)
    assert tinted[0] == 0
    order = [places[kind] for kind in ("box", "point") for places in (TEACHER, STUDENT)]
    for got, place in zip(tinted[1:], order, strict=True):
        want = sum(area(place, size) * all_of for size, all_of in zip(SIZES, shown, strict=True))
        # Less its outline, the prompt, and a label.
        assert 0.7 * want < got < 1.02 * want
    assert (grey[1:] < 0.98 * grey[0]).all()
    # Two rows of pictures with a caption above, on white.
    rows = np.flatnonzero((abs(image - GREY).max(-1) <= 3).sum(1) > 50)
    assert rows[0] > 2 * sheet.LINE
    assert rows[-1] < len(image) - sheet.GAP // 2
    assert (np.diff(rows) > 1).sum() >= 1
    assert (image[0] == 255).all() and (image[-1] == 255).all()


def test_masks_lie_where_they_should(drawn):
    """In the first row's column of the teacher's box: the corners of its mask, by colour."""
    image = drawn()
    column = sheet.HEADS.index("teacher, box")
    left = sheet.GAP + column * (sheet.SIDE + sheet.GAP)
    top = np.flatnonzero(abs(image[:, left + 2] - GREY).max(-1) <= 3)[0]
    scale = sheet.SIDE / 256
    for x, y, level in ((64, 64, TINTED), (88, 40, TINTED), (120, 64, GREY), (64, 120, GREY)):
        pixel = image[top + round(y * scale), left + round(x * scale)]
        assert abs(pixel - level).max() <= 3, (x, y)


def test_a_photograph_without_objects_is_shown_as_it_is(drawn):
    grey, tinted = pictures(drawn(counts=False)).T
    assert not tinted.any()
    assert (grey > 0.9 * grey[0]).all()


ANSWERS = jax.jit(
    sheet.answers.__wrapped__,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},  # compiles sooner
)


def test_a_student_that_is_its_teacher_answers_the_same():
    config, teacher, key = models.TINY, models.random_model(), jax.random.key(0)
    views = Views(jnp.asarray(normal(2, 64, 64, 3)), jnp.array([[64, 48], [40, 64]]))
    found, masks = ANSWERS(config, models.random_arrays(config), teacher, views, key)
    for row in range(2):
        inside = objects.inside(views.size[row], 16)
        same = (masks[row] & inside) == found.target[row]
        assert np.mean(same) > 0.999  # but for logits of about 0
    assert 0.05 < np.mean(found.target) < 0.95
    asked, other = ANSWERS(config, models.random_arrays(config, 1), teacher, views, key)
    np.testing.assert_array_equal(asked.target, found.target)
    assert np.mean(other == masks) < 0.95
