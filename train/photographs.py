"""Reading photographs by name, from folders and from plain tars, from many threads at once.

A tar is read in place: its headers are listed once, then a photograph is one seek and one read.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import glob
import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from samlight_jax.errors import InputError
from samlight_jax.preprocess import MAX_PIXELS, Frame, as_array

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
Root = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Entry(NamedTuple):
    """One file: `size` bytes at `offset` of `path`; size -1 is the whole of `path`.

    `where` is the name after the name of the folder or tar that holds it.
    """

    path: str
    offset: int
    size: int
    where: str


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The files under some folders and tars, by name; made by `open_photographs`.

    A name is the path within its folder or tar. Where several of these hold the same one, each is
    preceded by the name of its folder or tar.
    """

    entries: dict[str, Entry]
    by_tail: dict[str, list[str]]  # the last part of a name -> names
    source: str  # for messages

    @property
    def names(self) -> tuple[str, ...]:
        """The photographs, by their suffix, in the order of the folders and tars."""
        return tuple(name for name in self.entries if name.lower().endswith(SUFFIXES))

    def find(self, wanted: str) -> str | None:
        """The name of the file that annotations call `wanted`, or None.

        It is the file of that name, or the only one whose path ends so: annotations say
        "000000000139.jpg" or "val2017/000000000139.jpg" for one file.

        Raises:
          InputError: several files end so.
        """
        if wanted in self.entries:
            return wanted
        tail = wanted.rsplit("/", 1)[-1]
        found = [
            name
            for name in self.by_tail.get(tail, ())
            if f"/{self.entries[name].where}".endswith(f"/{wanted}")
        ]
        if len(found) > 1:
            raise InputError(
                f"{wanted!r} could be {found[0]!r} or {found[1]!r} of {self.source}; expected one "
                "such file: name the folder of this split as the root."
            )
        return found[0] if found else None

    def read_bytes(self, name: str) -> bytes:
        """A file as it is.

        Raises:
          InputError: there is none of this name, or it is cut off.
        """
        if name not in self.entries:
            raise InputError(f"{self.source} holds no file {name!r}.")
        path, offset, size, _ = self.entries[name]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(f"{name}: {path} cannot be read ({error.strerror}).") from None
        if len(data) < size:
            raise InputError(
                f"{name}: {path} ends after {len(data)} of its {size} bytes; copy the tar again."
            )
        return data

    def read(self, name: str, *, upright: bool) -> np.ndarray:
        """A photograph as (height, width, 3) uint8 RGB; see `decode`."""
        return decode(self.read_bytes(name), name, upright=upright)


class Names:
    """The photographs that some files name, one a line: `name in Names(paths)`.

    A line may leave out the first part of a name, the folder or tar that holds the photograph.

    Args:
      paths: text or CSV; of the latter the column `file` counts, or else the first.

    Raises:
      InputError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.listed: set[str] = set()
        for path in paths:
            try:
                with open(path, newline="") as file:
                    rows = [row for row in csv.reader(file) if row]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}); expected names of photographs, one a line."
                ) from None
            column = rows[0].index("file") if rows and "file" in rows[0] else 0
            self.listed.update(row[column] for row in rows if len(row) > column)

    def __contains__(self, name: str) -> bool:
        return name in self.listed or name.split("/", 1)[-1] in self.listed


def open_photographs(root: Root) -> Photographs:
    """Lists the files of a folder (and of the tars in it), of a tar, or of several.

    Args:
      root: a path, a pattern such as "shards/*.tar", or several of them.

    Raises:
      InputError: nothing is there, a tar is compressed or damaged, or two files have one name.
    """
    roots = [root] if isinstance(root, (str, os.PathLike)) else root
    places = [place for each in roots for place in _places(Path(each))]
    source = ", ".join(map(str, roots))
    listed = [(place, name, entry) for place in places for name, entry in _list(place)]
    times = collections.Counter(name for _, name, _ in listed)
    entries: dict[str, Entry] = {}
    by_tail: dict[str, list[str]] = collections.defaultdict(list)
    for place, name, entry in listed:
        unique = entry.where if times[name] > 1 else name
        if unique in entries:
            raise InputError(
                f"{source} holds two files {unique!r}, one of them in {place}; expected different "
                "names: rename one."
            )
        entries[unique] = entry
        by_tail[name.rsplit("/", 1)[-1]].append(unique)
    return Photographs(entries, dict(by_tail), source)


def _places(root: Path) -> list[Path]:
    """The folders and tars that a root stands for."""
    if root.is_dir():
        return [root, *sorted(root.glob("*.tar"))]
    if root.exists():
        return [root]
    if found := sorted(glob.glob(str(root))):
        return [place for each in found for place in _places(Path(each))]
    raise InputError(f"There is no {root}; expected a folder or a tar of photographs.")


def _list(place: Path) -> list[tuple[str, Entry]]:
    container = place.name.removesuffix(".tar")
    if place.is_file():
        members = _members(place)
        return [
            (name, Entry(str(place), offset, size, f"{container}/{name}"))
            for name, offset, size in members
        ]
    files = [
        Path(folder, file)
        for folder, _, files in os.walk(place)
        for file in files
        if not file.endswith(".tar")
    ]
    names = sorted((path.relative_to(place).as_posix(), str(path)) for path in files)
    return [(name, Entry(path, 0, -1, f"{container}/{name}")) for name, path in names]


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of the files of a tar; of two with one name the later counts."""
    try:
        with tarfile.open(path, "r:") as tar:
            return list(
                {
                    (name := member.name.removeprefix("./")): (
                        name,
                        member.offset_data,
                        member.size,
                    )
                    for member in tar
                    if member.isfile() and not member.issparse()
                }.values()
            )
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} is not a whole, plain tar ({error}); expected a folder or an uncompressed "
            "tar: unpack a compressed one first."
        ) from None


def decode(data: bytes, name: str, *, upright: bool) -> np.ndarray:
    """An encoded photograph as (height, width, 3) uint8 RGB.

    Args:
      data: JPEG, PNG or what else Pillow reads.
      name: for messages.
      upright: whether to apply the EXIF orientation, as `samlight_jax.predict` does. Annotations
        belong to the stored pixels: without it.

    Raises:
      InputError: no image, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            Frame((image.height, image.width), 1 << 14)  # its limits, before the pixels are decoded
            return as_array(ImageOps.exif_transpose(image) if upright else image)
    except Image.DecompressionBombError:
        raise InputError(
            f"{name} has more pixels than the {MAX_PIXELS} accepted; make it smaller first."
        ) from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    # Pillow raises what it likes on damaged bytes: AttributeError, struct.error, RuntimeError ...
    except Exception as error:
        raise InputError(f"{name} is damaged or no image ({_first_line(error)}).") from None


def stored_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) from the header of an encoded photograph; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as error:  # see `decode`
        raise InputError(f"{name} is damaged or no image ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    # Pillow names the memory address of the stream: two runs would tell different sentences.
    return str(error).split(" <_io")[0].splitlines()[0] if str(error) else type(error).__name__
