import concurrent.futures
import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from samlight_jax.errors import InputError
from samlight_jax.preprocess import as_array
from train.photographs import decode, open_photographs, stored_size


def photograph(i, height=6, width=8):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png", **options)
    return file.getvalue()


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(array))


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_is_listed_in_order_and_read_by_name(tmp_path):
    for i, name in enumerate(["b.png", "a/c.PNG", "a.png"]):
        save(tmp_path / name, photograph(i))
    (tmp_path / "readme.txt").write_text("no photograph")
    photographs = open_photographs(tmp_path)
    assert photographs.names == ("a.png", "a/c.PNG", "b.png")
    np.testing.assert_array_equal(photographs.read("a/c.PNG", upright=False), photograph(1))
    assert photographs.read_bytes("readme.txt") == b"no photograph"
    with pytest.raises(InputError, match=r"holds no file 'c\.png'"):
        photographs.read("c.png", upright=False)


def test_tars_are_read_in_place_from_many_threads(tmp_path):
    for shard in range(2):
        files = {f"./{shard}{i}.png": png(photograph(10 * shard + i)) for i in range(10)}
        tar(tmp_path / f"shard-{shard}.tar", files)
    photographs = open_photographs(str(tmp_path / "shard-*.tar"))
    assert photographs.names == tuple(f"{i:02d}.png" for i in range(20))
    assert open_photographs(tmp_path).names == photographs.names  # the folder that holds them
    several = [tmp_path / "shard-1.tar", tmp_path / "shard-0.tar"]
    assert open_photographs(several).names == photographs.names[10:] + photographs.names[:10]
    names = photographs.names * 20
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda name: photographs.read(name, upright=True), names))
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(image, photograph(int(name[:2])))


def test_equal_names_get_the_name_of_their_tar(tmp_path):
    for i, shard in enumerate("xy"):
        files = {"0.png": png(photograph(i)), f"only-{shard}.png": png(photograph(9))}
        tar(tmp_path / f"{shard}.tar", files)
    photographs = open_photographs(tmp_path)
    assert photographs.names == ("x/0.png", "only-x.png", "y/0.png", "only-y.png")
    np.testing.assert_array_equal(photographs.read("y/0.png", upright=False), photograph(1))
    twice = [tmp_path / "x.tar", tmp_path / "x.tar"]
    with pytest.raises(InputError, match=r"holds two files 'x/0\.png'"):
        open_photographs(twice)


def test_find_by_the_end_of_the_path(tmp_path):
    save(tmp_path / "val2017" / "1.png", photograph(0))
    save(tmp_path / "val2017" / "deep" / "2.png", photograph(0))
    save(tmp_path / "train2017" / "2.png", photograph(0))
    photographs = open_photographs([tmp_path / "val2017", tmp_path / "train2017"])
    assert photographs.find("1.png") == photographs.find("val2017/1.png") == "1.png"
    assert photographs.find("train2017/2.png") == "2.png" == photographs.find("2.png")
    assert photographs.find("deep/2.png") == "deep/2.png"
    assert photographs.find("3.png") is None
    assert photographs.find("test2017/1.png") is None
    assert photographs.find("017/1.png") is None  # a part of a name is no name
    with pytest.raises(InputError, match=r"'2\.png' could be .* expected one such file"):
        open_photographs(tmp_path).find("2.png")


def test_orientation_is_applied_on_demand_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    path = tmp_path / "turned.png"
    path.write_bytes(png(photograph(0), exif=exif))
    photographs = open_photographs(tmp_path)
    np.testing.assert_array_equal(photographs.read("turned.png", upright=False), photograph(0))
    upright = photographs.read("turned.png", upright=True)
    np.testing.assert_array_equal(upright, np.rot90(photograph(0), -1))
    np.testing.assert_array_equal(upright, as_array(path))  # as `samlight_jax.predict` reads it


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_grey_alpha_and_palettes_become_rgb(mode):
    image = Image.fromarray(photograph(0)).convert(mode)
    file = io.BytesIO()
    image.save(file, "png")
    got = decode(file.getvalue(), "x.png", upright=False)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def test_damaged_photographs_are_refused_by_name():
    data = png(photograph(0, 60, 80))
    for bad in (b"", b"no image", data[:-4000], data[:20]):
        with pytest.raises(InputError, match=r"^x\.png.*damaged") as caught:
            decode(bad, "x.png", upright=True)
        assert "0x" not in str(caught.value)  # no address: two runs tell the same
    with pytest.raises(InputError, match=r"^x\.png: .* too narrow"):
        decode(png(np.zeros((1, 40000, 3), np.uint8)), "x.png", upright=True)


def test_damaged_exif_is_no_other_error():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "abc"
    file = io.BytesIO()
    Image.fromarray(photograph(0)).save(file, "jpeg", exif=exif)
    text, number = b"\x01\x0f\x00\x02\0\0\0\4", b"\x01\x0f\x00\x0b\0\0\0\1"  # the maker's name
    assert text in file.getvalue()
    data = file.getvalue().replace(text, number)
    with Image.open(io.BytesIO(data)) as image, pytest.raises(AttributeError):
        ImageOps.exif_transpose(image)
    with pytest.raises(InputError, match=r"x\.png is damaged"):
        decode(data, "x.png", upright=True)
    assert decode(data, "x.png", upright=False).shape == (6, 8, 3)


def test_stored_size_needs_the_header_alone():
    data = png(photograph(0, 60, 80))
    assert stored_size(data[:1000], "x.png") == (60, 80)
    with pytest.raises(InputError, match=r"x\.png is damaged or no image"):
        stored_size(b"no image", "x.png")


def test_damaged_tars_are_refused(tmp_path):
    files = {f"{i}.png": png(photograph(i, 40, 40)) for i in range(3)}
    packed = tar(tmp_path / "x.tar.gz", files, "w:gz")
    with pytest.raises(InputError, match="not a whole, plain tar"):
        open_photographs(packed)
    whole = tar(tmp_path / "x.tar", files)
    photographs = open_photographs(whole)
    cut = whole.read_bytes()[:7000]
    whole.write_bytes(cut)  # while it is open
    with pytest.raises(InputError, match=r"2\.png: .* ends after \d+ of its"):
        photographs.read("2.png", upright=False)
    with pytest.raises(InputError, match="not a whole, plain tar"):
        open_photographs(whole)
    with pytest.raises(InputError, match=r"There is no .*nothing; expected a folder or a tar"):
        open_photographs(tmp_path / "nothing")
