"""Parts that stay what they are from run to run, and what is read of them."""

import io
import tarfile

import pytest

from samlight_jax import engine_ray_parts as parts
from samlight_jax.engine_ray_parts import Output, Part
from samlight_jax.errors import InputError

fsspec = pytest.importorskip("fsspec")


def test_a_plan_stays_and_grows(tmp_path):
    here = tmp_path / "in"
    here.mkdir()
    for name in ("b.png", "c.png", "d.png"):
        (here / name).write_bytes(b"")
    output = Output.of(str(tmp_path / "o"))
    inputs = [str(here), str(here / "c.png"), str(here / "*.png")]  # each is done once
    first = parts.planned(output, *parts.found(inputs), 2)
    source = here.as_uri()
    assert first == [
        Part("part-000000", source, ("b.png", "c.png")),
        Part("part-000001", source, ("d.png",)),
    ]
    (here / "a.png").write_bytes(b"")
    (here / "b.png").unlink()
    second = parts.planned(output, *parts.found(inputs), 1)
    assert second == [*first, Part("part-000002", source, ("a.png",))]
    assert parts.planned(output, *parts.found(inputs), 7) == second


def test_a_stores_photographs_come_in_order_and_a_few_ahead(monkeypatch):
    memory = fsspec.filesystem("memory")
    names = [f"{i:02}.png" for i in range(3 * parts.AHEAD)]
    memory.store.clear()
    memory.pipe({f"/in/{name}": name.encode() for name in names if name != "07.png"})
    asked, cat_file = [], type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path: asked.append(path) or cat_file(self, path)
    )
    for i, (name, data) in enumerate(parts.photographs(Part("p", "memory://in", tuple(names)))):
        assert name == names[i] and len(asked) <= i + parts.AHEAD
        if name == "07.png":
            assert isinstance(data, InputError) and str(data) == "There is no image 07.png."
        else:
            assert data == name.encode()
    assert sorted(asked) == [f"/in/{name}" for name in names]


def test_a_damaged_tar_gives_what_it_holds_and_says_so():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (
            ("a.png", b"A"),
            ("a.png", b"B"),
            ("x.txt", b"X"),
            ("c.png", b"C" * 9000),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/t.tar", file.getvalue()[:5000])
    first, twice, end = parts.photographs(Part("p", "memory:///t.tar", None))
    assert first == ("a.png", b"A")
    assert twice[0] == "a.png" and "twice" in str(twice[1])
    assert end[0] == "memory:///t.tar" and "ends early" in str(end[1])
    # A tar that cannot be reached is not the same as a bad one: its part is done another time.
    for url in ("memory:///gone.tar", "http://127.0.0.1:9/t.tar"):
        with pytest.raises(OSError, match="cannot be used"):
            list(parts.photographs(Part("p", url, None)))


def test_the_output_of_another_job_is_refused(tmp_path):
    output = Output.of(str(tmp_path))
    parts.settle(output, {"command": "amg", "points": (1, 2)})
    parts.settle(output, {"command": "amg", "points": (1, 2)})
    with pytest.raises(InputError, match=r"made with points \[1, 2\], not \[1, 3\]"):
        parts.settle(output, {"command": "amg", "points": (1, 3)})
    (tmp_path / "settings.json").write_text('{"folder": "x"}')
    with pytest.raises(InputError, match="another command's"):
        parts.settle(output, {"command": "amg"})
    (tmp_path / "settings.json").unlink()
    output.write("parts/part-000000.json", b"")
    with pytest.raises(InputError, match="holds parts of something else"):
        parts.settle(output, {"command": "amg"})
