"""What the host does before the devices."""

from samlight_jax.preprocess import Frame
from train.annotations import Photo
from train.evaluator_load import canvas_of, plan, weights_of


def test_canvases_are_few_and_hold_the_photograph():
    sizes = [(1, 1), (480, 640), (640, 481), (641, 1), (2048, 100), (2049, 100), (100, 5000), None]
    canvases = [canvas_of(Photo("x", "x", size)) for size in sizes]
    assert canvases == [
        (256, 256), (640, 640), (640, 640), (768, 768), (2048, 2048), (4096, 256), (256, 6144),
        (256, 256),
    ]  # fmt: skip


def test_a_plan_keeps_canvases_apart_and_loses_nobody():
    sizes = [(300, 300), (600, 600), (100, 300), (90, 90), (512, 40), (700, 1)]
    photos = [Photo(str(i), str(i), size) for i, size in enumerate(sizes)]
    batches = [[photo.id for photo in batch] for batch in plan(photos, 2)]
    assert batches == [["3"], ["0", "2"], ["4"], ["1"], ["5"]]


def test_resize_weights_are_kept_by_size():
    first = weights_of(Frame((30, 40), 64), 16)
    assert weights_of(Frame((30, 40), 64), 16) is first
    assert [w.shape for w in first] == [(30, 16), (40, 16)]


# The real weights.
