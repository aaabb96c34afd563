import io
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from samlight_jax.errors import InputError
from tests.train import runs
from train import data, sharding
from train.config import Mesh
from train.evaluate_tiny import tiny_data


@pytest.fixture
def folder(tmp_path):
    return runs.photographs(tmp_path / "photographs")


def rows_of(items, batch=4, steps=6, process=0, processes=1):
    return data.Rows(items, 7, sharding.rows_of(process, processes, batch), batch, steps)


def test_a_photograph_lies_top_left_and_its_edge_fills_the_rest():
    photo = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8)
    one = data.on_canvas(photo, 8)
    assert one["sizes"].tolist() == [3, 5]
    assert np.array_equal(one["photos"][:3, :5], photo)
    assert (one["photos"][3:, :5] == photo[2]).all() and (
        one["photos"][:3, 5:] == photo[:, 4:]
    ).all()


def test_a_large_photograph_is_made_smaller_and_a_small_one_is_not():
    wide = np.zeros((100, 301, 3), np.uint8)
    assert data.on_canvas(wide, 64)["sizes"].tolist() == [21, 64]
    assert data.on_canvas(wide[:10, :20], 64)["sizes"].tolist() == [10, 20]


def test_excludes_by_name_and_by_a_column_called_file(tmp_path, folder):
    plain, table = tmp_path / "plain.txt", tmp_path / "table.csv"
    plain.write_text("03.png\n")
    table.write_text("shard,file\nx.tar,05.png\n")
    photos = data.Photos([str(folder)], [str(plain), str(table)], 64)
    assert len(photos) == 8 and not {"03.png", "05.png"} & set(photos.names)
    with pytest.raises(InputError, match=r"nowhere cannot be read"):
        data.Photos([str(folder)], [str(tmp_path / "nowhere")], 64)


def test_reads_folders_and_tars_alike(tmp_path, folder):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    one, other = (data.Photos([str(x)], [], 64) for x in (folder, tmp_path / "all.tar"))
    assert one.names == other.names and one.fingerprint == other.fingerprint
    assert np.array_equal(one[3]["photos"], other[3]["photos"])


def test_an_unreadable_photograph_is_replaced_by_the_next(folder):
    (folder / "03.png").write_bytes(b"no image")
    photos = data.Photos([str(folder)], [], 64, max_bad=0.1)
    assert np.array_equal(photos[3]["photos"], photos[4]["photos"])
    assert list(photos.bad) == ["03.png"]
    (folder / "04.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 10 photographs .* max_bad=0.1 allows: 03.png"):
        photos[3]


def test_no_photographs_are_refused(tmp_path):
    with pytest.raises(InputError, match="No photographs were given"):
        data.Photos([], [], 64)
    with pytest.raises(InputError, match="No photograph is left"):
        data.Photos([str(tmp_path)], [], 64)


def test_every_photograph_comes_once_before_any_comes_again(folder):
    items = data.Items(None, None, 12)
    rows = rows_of(items)
    drawn = [int(rows[i]["item"]) for i in range(len(rows))]
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:], "each round has an order of its own"
    assert drawn[:12] != list(range(12))


def test_processes_share_the_rows_of_one():
    items = data.Items(None, None, 12)
    whole = rows_of(items)
    parts = [rows_of(items, process=i, processes=2) for i in range(2)]
    for step in range(6):
        want = [int(whole[4 * step + j]["item"]) for j in range(4)]
        got = [int(part[2 * step + j]["item"]) for part in parts for j in range(2)]
        assert got == want


def test_batches_from_a_later_step_are_those_of_the_whole_run(folder):
    photos = data.Photos([str(folder)], [], 64)
    rows, mesh = rows_of(data.Items(photos, None, len(photos))), sharding.make_mesh(Mesh())
    whole = [jax.device_get(x) for x in data.batches(rows, 0, mesh)]
    later = [jax.device_get(x) for x in data.batches(rows, 4, mesh)]
    assert len(whole) == 6 and len(later) == 2
    for x, y in zip(whole[4:], later, strict=True):
        assert all(np.array_equal(x[name], y[name]) for name in ("item", "photos", "sizes"))


def test_resident_photographs_are_those_that_are_decoded(folder):
    photos = data.Photos([str(folder)], [], 64)
    resident = data.Resident(photos, sharding.make_mesh(Mesh()))
    wanted = np.array([7, 0, 7, 12], np.int32)  # 12: the third, of a second view
    found = jax.device_get(jax.jit(resident.take)(resident.arrays, wanted))
    for i, item in enumerate(wanted):
        want = photos[item % 10]
        assert all(np.array_equal(found[name][i], want[name]) for name in want)


def test_a_truncated_tar_is_refused(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture.getvalue())
        tar.addfile(info, io.BytesIO(picture.getvalue()))
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(InputError):
        data.Photos([str(path)], [], 8, max_bad=0)[0]


def test_annotated_photographs_bring_their_masks(tmp_path):
    tiny_data(tmp_path / "set")
    photos = data.Photos([f"coco:{tmp_path / 'set'}"], [], 64, annotated=True)
    assert len(photos) == 4
    for i in range(4):
        one = photos[i]
        masks, (height, width) = one["masks"], one["sizes"]
        assert masks.shape == (data.MASKS, 16, 16) and set(np.unique(masks)) == {0, 1}
        assert masks[:2].any((1, 2)).all() and not masks[2:].any()
        assert not masks[:, -(-height // 4) :].any() and not masks[:, :, -(-width // 4) :].any()
        # The ellipses are bright, the rest is dark.
        bright = (one["photos"].max(axis=2) > 125).reshape(16, 4, 16, 4).mean((1, 3))
        sure = abs(bright - 0.5) > 0.3  # not on an edge
        sure[height // 4 :], sure[:, width // 4 :] = False, False
        assert sure.sum() > 30
        assert np.array_equal((bright > 0.5)[sure], masks[:2].any(0)[sure])


def test_photographs_without_annotations_are_left_out_where_masks_are_wanted(folder):
    with pytest.raises(InputError, match="No annotated photograph is left"):
        data.Photos([str(folder)], [], 64, annotated=True)
