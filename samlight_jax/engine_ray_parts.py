"""The parts of a job with `--engine ray`: what each reads, and where it is noted as finished.

A part is a tar, or some photographs of a folder. The output's plan.jsonl holds the parts from the
first run on: a later one never changes them, it adds parts for photographs that are new. A part is
finished when records/ holds its record, which is written after its file in parts/.

Folders, tars and object stores are all reached through fsspec.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from samlight_jax import weights
from samlight_jax.errors import InputError

PLAN = "plan.jsonl"
SETTINGS = "settings.json"
RECORDS = "records"
PARTS = "parts"
TRIES = "tries"
TARS = (".tar", ".tar.gz", ".tgz")
AHEAD = 8  # photographs of a store that are on their way while the model works
BROKEN_TAR = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of work.

    Attributes:
      name: what its file and its record are called.
      source: the URL of a tar, or of the folder that `files` lie in.
      files: paths within the folder; None for a tar.
    """

    name: str
    source: str
    files: tuple[str, ...] | None

    @classmethod
    def from_json(cls, text: str | bytes) -> Part:
        """The inverse of `to_json`."""
        name, source, files = json.loads(text)
        return cls(name, source, None if files is None else tuple(files))

    def to_json(self) -> str:
        """One line."""
        return json.dumps([self.name, self.source, self.files])


@dataclasses.dataclass(frozen=True)
class Output:
    """The folder of results, here or in a store; a file in it appears whole or not at all."""

    url: str

    @classmethod
    def of(cls, path: str) -> Output:
        """From what a user types; nothing is written yet."""
        fs, root = reach(path)
        with reaching(path):
            if fs.isfile(root):
                raise InputError(f"--output {path} is a file; give a folder.")
        return cls(fs.unstrip_protocol(root))

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there."""
        fs, root = reach(self.url)
        with reaching(self.url), contextlib.suppress(FileNotFoundError):
            return fs.cat_file(f"{root}/{name}")
        return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole: by renaming it here, while a store shows only whole ones."""
        fs, root = reach(self.url)
        path = f"{root}/{name}"
        with reaching(self.url):
            if _is_local(fs):
                weights.write_whole(Path(path), lambda scratch: scratch.write_bytes(data))
            else:
                fs.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        fs, root = reach(self.url)
        with reaching(self.url), contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")

    def names(self, folder: str) -> set[str]:
        """What a folder in it holds; nothing if there is no such folder."""
        fs, root = reach(self.url)
        with reaching(self.url), contextlib.suppress(FileNotFoundError):
            fs.invalidate_cache()
            return {path.rsplit("/", 1)[-1] for path in fs.ls(f"{root}/{folder}", detail=False)}
        return set()

    def sweep(self) -> None:
        """Removes what killed workers were writing; see `weights.write_whole`."""
        fs, root = reach(self.url)
        if _is_local(fs):
            for folder in (PARTS, RECORDS, TRIES):
                for left in Path(root, folder).glob(".part-*"):
                    shutil.rmtree(left, ignore_errors=True)


def reach(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path within it."""
    try:
        fsspec = importlib.import_module("fsspec.core")
    except ImportError:
        raise InputError(
            "--engine ray needs fsspec, which is not installed; pip install 'samlight-jax[ray]'."
        ) from None
    with reaching(url):
        return fsspec.url_to_fs(url)


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Makes one sentence of whatever a store raises; each has exceptions of its own."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise OSError(f"{url} cannot be used ({type(error).__name__}: {lines[0]}).") from error


def is_photograph(name: str) -> bool:
    """Whether Pillow may read a file of this name; hidden ones it need not."""
    return Path(name).suffix.lower() in _suffixes() and not name.rsplit("/", 1)[-1].startswith(".")


@functools.cache
def _suffixes() -> set[str]:
    return {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def settle(output: Output, settings: dict[str, Any]) -> None:
    """Notes what the output is made with, or refuses to mix it with something else."""
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they come back
    text = output.read(SETTINGS)
    if text is None:
        if output.names(PARTS):
            raise InputError(f"{output.url} holds parts of something else; give another --output.")
        output.write(SETTINGS, json.dumps(settings).encode())
        return
    try:
        there = json.loads(text)
        changed = [name for name in settings if there[name] != settings[name]]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{output.url} holds another command's {SETTINGS}; give another --output."
        ) from None
    if changed:
        name = changed[0]
        raise InputError(
            f"{output.url} was made with {name} {there[name]}, not {settings[name]}; give another "
            "--output, or remove it."
        )


def found(inputs: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The photographs of each folder, and the tars, that some paths, patterns or URLs stand for.

    Folders within folders are searched; what is hidden is not.

    Raises:
      InputError: there is nothing at an input, or no photograph at any.
      OSError: a store that cannot be reached.
    """
    folders: dict[str, list[str]] = collections.defaultdict(list)
    tars: set[str] = set()
    seen: set[str] = set()
    for url in inputs:
        for source, name in _files(url):
            path = f"{source}/{name}"
            if name.lower().endswith(TARS):
                tars.add(path)
            elif is_photograph(name) and path not in seen:
                seen.add(path)
                folders[source].append(name)
    if not folders and not tars:
        raise InputError(f"There is no photograph and no tar in {', '.join(inputs)}.")
    return {source: sorted(folders[source]) for source in sorted(folders)}, sorted(tars)


def _files(url: str) -> Iterator[tuple[str, str]]:
    """(URL of the folder, path within it) of every file."""
    fs, pattern = reach(url)
    with reaching(url):
        fs.invalidate_cache()
        several = any(letter in pattern for letter in "*?[") and not fs.exists(pattern)
        for path in sorted(fs.glob(pattern)) if several else [pattern]:
            if fs.isfile(path):
                folder, _, name = path.rpartition("/")
                yield fs.unstrip_protocol(folder), name
                continue
            if not fs.isdir(path):
                raise InputError(f"There is no folder, tar or photograph {url}.")
            for file in fs.find(path):
                name = file[len(path.rstrip("/")) + 1 :]
                if not any(word.startswith(".") for word in name.split("/")):
                    yield fs.unstrip_protocol(path).rstrip("/"), name


def planned(
    output: Output, folders: dict[str, list[str]], tars: list[str], photos: int
) -> list[Part]:
    """All parts: those of earlier runs as they were, and new ones for what is new."""
    parts = [Part.from_json(line) for line in (output.read(PLAN) or b"").splitlines()]
    known = {f"{p.source}/{file}" if file else p.source for p in parts for file in p.files or [""]}
    work: list[tuple[str, tuple[str, ...] | None]] = []
    for source, names in folders.items():
        new = [name for name in names if f"{source}/{name}" not in known]
        work += [(source, tuple(new[i : i + photos])) for i in range(0, len(new), photos)]
    work += [(tar, None) for tar in tars if tar not in known]
    parts += [Part(f"part-{i:06}", *some) for i, some in enumerate(work, len(parts))]
    if work:
        output.write(PLAN, "".join(part.to_json() + "\n" for part in parts).encode())
    return parts


def unfinished(output: Output, parts: Sequence[Part]) -> list[Part]:
    """Those without a record."""
    records = output.names(RECORDS)
    return [part for part in parts if f"{part.name}.json" not in records]


def photographs(part: Part) -> Iterator[tuple[str, Path | bytes | InputError]]:
    """(name, a local file, the bytes of one, or why there is none) of a part's photographs.

    Raises:
      OSError: a store that cannot be reached: not the photograph's fault.
    """
    fs, root = reach(part.source)
    if part.files is None:
        yield from _members(fs, root, part.source)
    elif _is_local(fs):
        yield from ((name, Path(root, name)) for name in part.files)
    else:
        yield from _fetched(fs, root, part.files)


def _fetched(
    fs: Any, root: str, files: Sequence[str]
) -> Iterator[tuple[str, Path | bytes | InputError]]:
    """A store's files, in order, a few at a time."""

    def fetch(name: str) -> bytes | InputError:
        with reaching(f"{root}/{name}"):
            try:
                return fs.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return InputError(f"There is no image {name}.")

    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque()
        for i, name in enumerate(files):
            while len(waiting) < AHEAD and i + len(waiting) < len(files):
                waiting.append(pool.submit(fetch, files[i + len(waiting)]))
            yield name, waiting.popleft().result()


def _members(fs: Any, path: str, url: str) -> Iterator[tuple[str, Path | bytes | InputError]]:
    """A tar's photographs in one go from its beginning to its end, as a store likes it."""
    seen = set()
    with reaching(url):
        try:
            with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    if not member.isfile() or not is_photograph(member.name):
                        continue
                    if member.name in seen:
                        yield member.name, InputError("The tar holds this name twice.")
                        continue
                    seen.add(member.name)
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    yield member.name, content.read()
        except FileNotFoundError:  # some stores say so when they cannot be reached, too
            raise OSError("it is not there, or not in reach") from None
        except BROKEN_TAR as error:
            yield url, InputError(f"The tar is damaged or ends early ({error}).")


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
