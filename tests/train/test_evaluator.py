"""The evaluator's engine; its oracle is `samlight_jax.predict`, one by one, and NumPy."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import samlight_jax
from samlight_jax import SamPredictor, weights
from samlight_jax.preprocess import Frame
from tests.models import random_model
from train import evaluator_grid as grid
from train.annotations import open_dataset
from train.detections import Detection, Detections
from train.evaluate_tiny import tiny_data
from train.evaluator import Evaluator
from train.metrics import boundary_iou
from train.prompts import corrective_click
from train.protocol import Protocol

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four photographs, of sides from 40 to 120, with two instances each."""
    return open_dataset(str(tiny_data(tmp_path_factory.mktemp("data") / "tiny")))


def records_of(dataset, protocol, photos=None, **options):
    evaluator = Evaluator(random_model(), protocol, **{"batch": 2, **options})
    batches = evaluator.plan(dataset.photos if photos is None else photos)
    return [record for batch in evaluator.run(dataset, batches) for record in batch]


def instances_of(dataset, records):
    """(record, instance of the data, image), an item each."""
    photos = {photo.id: photo for photo in dataset.photos}
    for record in records:
        photo = photos[record["photo"]]
        truths = {instance.id: instance for instance in photo.instances}
        for each in record["instances"]:
            yield each, truths[each["id"]], dataset.read(photo)


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def stability(logits):
    return (logits > 1).sum() / max((logits > -1).sum(), 1)


def box_fit(mask, box):
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0.0
    tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    sides = [max(0, min(tight[k + 2], box[k + 2]) - max(tight[k], box[k])) for k in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (tight, box)]
    return np.prod(sides) / (sum(areas) - np.prod(sides))


MERITS = {
    "pred-iou": lambda logits, predicted, box, truth: predicted,
    "stability": lambda logits, predicted, box, truth: stability(logits),
    "box-iou": lambda logits, predicted, box, truth: box_fit(logits > 0, box),
    "oracle": lambda logits, predicted, box, truth: iou(logits > 0, truth),
}


@pytest.mark.parametrize("select", ["single", *MERITS])
def test_the_box_protocol_is_predict_and_numpy(dataset, select):
    protocol = Protocol(mask_select=select, metric=("miou", "boundary"))
    found = list(instances_of(dataset, records_of(dataset, protocol, masks=True)))
    assert len(found) == 8
    for got, instance, image in found:
        logits, predicted, _ = samlight_jax.predict(
            image,
            box=instance.box,
            multimask_output=select != "single",
            return_logits=True,
            model=random_model(),
        )
        merits = [0.0]
        if select != "single":
            merits = [
                MERITS[select](one, p, instance.box, instance.mask())
                for one, p in zip(logits, predicted, strict=True)
            ]
        best = int(np.argmax(merits))
        mask = logits[best] > 0
        assert got["mask"] == (0 if select == "single" else best + 1)
        assert got["predicted_iou"] == pytest.approx(predicted[best], abs=1e-4)
        assert (coco_mask.decode(got["rle"]) != mask).mean() < 1e-3
        assert got["iou"] == pytest.approx(iou(mask, instance.mask()), abs=2e-3)
        assert got["boundary"] == pytest.approx(boundary_iou(mask, instance.mask()), abs=1e-2)
        assert got["box"] == list(instance.box) and got["points"] == []
    assert len({got["iou"] for got, _, _ in found}) > 4, "vacuous: all IoUs are alike"


def test_corrective_clicks_are_the_predictors(dataset):
    protocol = Protocol(prompt="point-dt", mask_select="pred-iou", refine=2)
    predictor = SamPredictor(random_model())
    for got, instance, image in instances_of(dataset, records_of(dataset, protocol)):
        truth, points = instance.mask(), [tuple(got["points"][0])]
        predictor.set_image(image)
        rounds, low_res = [], None
        for click in range(3):
            masks, predicted, low = predictor.predict(
                [p[:2] for p in points],
                [p[2] for p in points],
                mask_input=low_res,
                multimask_output=click == 0,
            )
            best = int(np.argmax(predicted))
            low_res = low[best][None]
            rounds.append(iou(masks[best], truth))
            if click < 2:
                points.append(corrective_click(masks[best], truth))
        assert got["points"] == [[*map(float, p[:2]), p[2]] for p in points]
        np.testing.assert_allclose(got["rounds"], rounds, atol=3e-3)
        assert got["iou"] == got["rounds"][-1]


def test_any_number_of_instances_goes_in_chunks(dataset):
    photo = dataset.photos[0]
    many = tuple(
        dataclasses.replace(photo.instances[i % 2], id=f"copy{i}") for i in range(101)
    )  # one call takes 4 rows of 2
    crowded = dataclasses.replace(photo, instances=many)
    (got,) = records_of(dataset, Protocol(), [crowded])
    (want,) = records_of(dataset, Protocol(), [photo])
    assert [i["id"] for i in got["instances"]] == [i.id for i in many]
    for k, each in enumerate(got["instances"]):
        assert each["iou"] == want["instances"][k % 2]["iou"]


def test_rows_at_once_and_arrays_used_again_change_nothing(tmp_path):
    """As on a GPU, and over more batches than there are arrays under way."""
    data = open_dataset(str(tiny_data(tmp_path / "tiny", photographs=9)))
    alone = [records_of(data, Protocol(prompt="box"), [photo], batch=1)[0] for photo in data.photos]
    evaluator = Evaluator(random_model(), Protocol(prompt="box"), batch=1)
    evaluator.engine = evaluator.engine._replace(slots=1, rows=4)
    batches = evaluator.plan(data.photos)
    together = {r["photo"]: r for batch in evaluator.run(data, batches) for r in batch}
    assert len(batches) == 9
    for one in alone:
        for a, b in zip(one["instances"], together[one["photo"]]["instances"], strict=True):
            assert a["iou"] == b["iou"] and a["predicted_iou"] == pytest.approx(
                b["predicted_iou"], abs=1e-5
            )


def test_photographs_that_fail_are_problems_and_change_nothing_else(tmp_path):
    data = tiny_data(tmp_path / "tiny")
    dataset = open_dataset(str(data))
    want = records_of(dataset, Protocol())
    names = [photo.name for photo in dataset.photos]
    absent, torn = (next(data.parent.rglob(Path(name).name)) for name in names[1:3])
    absent.unlink()
    torn.write_bytes(torn.read_bytes()[:60])
    got = records_of(dataset, Protocol())
    assert [len(record["problems"]) for record in got] == [0, 1, 1, 0]
    assert [record["problems"][0]["what"] for record in got[1:3]] == names[1:3]
    assert got[0] == want[0] and got[3] == want[3]
    (only,) = records_of(dataset, Protocol(), dataset.photos[1:2])
    assert only["problems"] and not only["instances"]


def test_crowds_and_small_instances_are_left_out_unless_asked_for(dataset):
    crowd, small = dataset.photos[0].instances
    crowd, small = dataclasses.replace(crowd, crowd=True), dataclasses.replace(small, area=9.0)
    photo = dataclasses.replace(dataset.photos[0], instances=(crowd, small))

    def ids(**fields):
        (record,) = records_of(dataset, Protocol(**fields), [photo])
        return [instance["id"] for instance in record["instances"]]

    assert ids() == [small.id]
    assert ids(crowd=True) == [crowd.id, small.id]
    assert ids(min_area=10.0) == []
    assert ids(min_area=9.0) == [small.id]


def test_detections_give_masks_with_their_scores(dataset):
    photo = dataset.photos[0]
    x1, y1, x2, y2 = photo.instances[0].box
    box = (x1 + 1, y1, x2 - 2, y2)
    detections = Detections({photo.id: (Detection("d0", box, 1, 0.25),)}, [], "print")
    protocol = Protocol(prompt="detector", metric=("ap",), detections=Path("x"))
    records = records_of(dataset, protocol, detections=detections)
    (got,) = records[0]["instances"]
    assert [len(record["instances"]) for record in records] == [1, 0, 0, 0]
    assert got["score"] == 0.25 and "iou" not in got
    mask, _, _ = samlight_jax.predict(
        dataset.read(photo), box=box, multimask_output=False, model=random_model()
    )
    assert (coco_mask.decode(got["rle"]) != mask[0]).mean() < 1e-3


def test_random_prompts_depend_on_the_seed_and_the_instance_alone(dataset):
    def points(seed, photos):
        found = records_of(dataset, Protocol(prompt="points-2", seed=seed), photos)
        return {i["id"]: i["points"] for record in found for i in record["instances"]}

    first, last = points(0, dataset.photos), points(0, dataset.photos[2:])
    assert {key: first[key] for key in last} == last
    assert points(1, dataset.photos[2:]) != last
    for photo in dataset.photos:
        for instance in photo.instances:
            for x, y, label in first[instance.id]:
                assert label == 1 and instance.mask()[int(y), int(x)]


def test_agreement_with_another_model(dataset):
    teacher = random_model(seed=1)
    records = records_of(dataset, Protocol(agree_with="x"), teacher=teacher)
    for got, instance, image in instances_of(dataset, records):
        ours, theirs = (
            samlight_jax.predict(image, box=instance.box, multimask_output=False, model=model)[0][0]
            for model in (random_model(), teacher)
        )
        assert got["agreement"] == pytest.approx(iou(ours, theirs), abs=3e-3)
    for record, photo in zip(records, dataset.photos, strict=True):
        image = dataset.read(photo)
        a, b = (samlight_jax.encode(image, model=m) for m in (random_model(), teacher))
        height, width = (-(-side // 16) for side in Frame(image.shape[:2], 64).input)
        a, b = (np.asarray(x)[:height, :width].reshape(-1, 256) for x in (a, b))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert record["embedding"]["mse"] == pytest.approx(np.square(a - b).mean(), rel=1e-3)
        assert record["embedding"]["cosine"] == pytest.approx(cosine.mean(), abs=1e-4)


def test_the_teachers_grid_is_the_rule_in_numpy(dataset):
    student, teacher = random_model(), random_model(seed=1)
    protocol = Protocol(prompt="teacher-grid", agree_with="x")
    bare = [dataclasses.replace(photo, instances=()) for photo in dataset.photos]
    records = records_of(dataset, protocol, bare, teacher=teacher, masks=True)
    count = 0
    for record, photo in zip(records, dataset.photos, strict=True):
        image = dataset.read(photo)
        want = list(grid_by_hand(image, student, teacher))
        count += len(want)
        assert [i["id"] for i in record["instances"]] == [str(i) for i, *_ in want]
        for got, (_, point, box, *agreements) in zip(record["instances"], want, strict=True):
            np.testing.assert_allclose(got["points"][0][:2], point, atol=1e-3)
            np.testing.assert_allclose(got["box"], box, atol=1e-3)
            found = [got[f"agreement{of}"] for of in ("", "_point", "_token")]
            assert found == pytest.approx(agreements, abs=2e-2)
            truth = coco_mask.decode(got["truth"])
            assert truth.shape == image.shape[:2]
            assert got["area"] == pytest.approx(truth.sum(), rel=0.5)
    assert count > 4, "vacuous: nothing is kept"


def grid_by_hand(image, student, teacher):
    """Number, point, box, agreements by box, point and token of the kept points; DESIGN's rule."""
    frame = Frame(image.shape[:2], 64)
    rows, columns = (-(-side // 4) for side in frame.input)

    def ask(model, choice=None, **prompt):
        multi = "box" not in prompt
        _, predicted, low = samlight_jax.predict(
            image, **prompt, multimask_output=multi, model=model
        )
        best = int(np.argmax(predicted)) if choice is None else choice
        return low[best, :rows, :columns] > 0, predicted[best], best

    kept = []
    height, width = image.shape[:2]
    for number in range(16):
        point = (number % 4 + 0.5) / 4 * width, (number // 4 + 0.5) / 4 * height
        prompt = {"point_coords": [point], "point_labels": [1]}
        mask, predicted, choice = ask(teacher, **prompt)
        if not (predicted > 0.75 and 0.002 <= mask.mean() <= 0.7):
            continue
        if any(iou(mask, other) >= 0.8 for other in kept):
            continue
        kept.append(mask)
        y, x = np.nonzero(mask)
        tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) * 4
        box = tight / np.tile(frame.scale, 2)
        by_box = iou(ask(teacher, box=box)[0], ask(student, box=box)[0])
        by_point, by_token = (iou(mask, ask(student, c, **prompt)[0]) for c in (None, choice))
        yield number, point, box, by_box, by_point, by_token


def test_distinct_keeps_the_first_of_those_that_overlap():
    masks = np.zeros((5, 4, 10), bool)
    masks[0, 0] = masks[1, 0] = masks[2, 0] = masks[3, 0] = True  # ten pixels
    masks[1, 0, :2] = False  # 8 of 10: the same as 0
    masks[2, 0, :3] = False  # 7 of 10: another than 0; than 1, 7 of 8, but 1 is not kept
    masks[4, 2] = True
    good = np.array([True, True, True, False, True])
    assert grid.distinct(jnp.asarray(masks), jnp.asarray(good)).tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_bfloat16_casts_the_parameters_but_moves_no_point(dataset):
    model = weights.cast(random_model(), jnp.bfloat16)
    dtypes = collections.Counter(str(x.dtype) for x in jax.tree.leaves(model))
    assert dtypes["float32"] == 1 and dtypes["bfloat16"] > 50
    got, want = (
        [i["iou"] for r in records_of(dataset, Protocol(dtype=d)) for i in r["instances"]]
        for d in ("bfloat16", "float32")
    )
    assert got != want
    np.testing.assert_allclose(got, want, atol=0.1)


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    data = tiny_data(tmp_path / "tiny", photographs=11)
    program = """
import json, sys, jax
from tests.models import random_model
from train.annotations import open_dataset
from train.evaluator import Evaluator
from train.protocol import Protocol
assert jax.device_count() == 8
dataset = open_dataset(sys.argv[1])
found = []
for devices in (jax.devices(), jax.devices()[:1]):
    evaluator = Evaluator(random_model(), Protocol(prompt="point-dt", mask_select="oracle",
        metric=("miou", "boundary")), devices=devices, batch=1)
    batches = evaluator.run(dataset, evaluator.plan(dataset.photos))
    found.append([record for batch in batches for record in batch])
print(json.dumps(found))
"""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program, str(data)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    eight, one = json.loads(done.stdout)
    assert eight == one and sum(len(record["instances"]) for record in one) == 22


# The parts, by themselves.
