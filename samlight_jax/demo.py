"""The command `samlight demo`: a page to click on, served from this machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from samlight_jax.build_sam import DEFAULT, default_model, find, keep_compilations
from samlight_jax.config import PRESETS
from samlight_jax.errors import InputError
from samlight_jax.pipeline import predict
from samlight_jax.preprocess import as_array

GRADIO = (6, 31)  # older ones know not all that `demo_page` asks of `launch`
MAX_EXAMPLES = 24
THUMBNAIL = 320  # pixels of its long side

Example = tuple[Path, Image.Image]


def demo(
    *,
    model: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME-OR-FILE")
    ] = (),
    examples: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Serves a page to click on: points, boxes, everything, downloads. Ctrl-C ends it.

    Photographs stay on this machine, each visitor's apart, and are forgotten an hour after their
    last use; nothing is sent elsewhere. There is no password: with another --host, whoever reaches
    it may use it.

    Args:
      model: a model file, or the name of one (see `samlight models`). May be repeated, to switch
        between them; without it, all named ones that are there, the default first.
      examples: photographs to pick from; without it, scikit-image's, if that is installed.
      host: the address to listen on.
      port: the port to listen on.
    """
    page = _page()
    shown = _examples(examples)
    models = _models(model)
    _check_address(host, port)
    keep_compilations()
    # Loads the first one and compiles its parts, so that no visitor waits for it.
    black = np.zeros((64, 64, 3), np.uint8)
    predict(black, [[32, 32]], [1], model=default_model(models[0]))
    # gradio asks its own server whether it is up, which a proxy would answer.
    known = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "localhost", host)
    os.environ["no_proxy"] = ",".join(filter(None, known))
    # `kill` ends it as Ctrl-C does, so that no visitor's photograph is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="samlight-demo-") as folder:
        blocks = page.launch(models, shown, host, port, Path(folder))
        print(f"samlight demo: {blocks.local_url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


def _page() -> Any:
    """The module `demo_page`, which needs gradio."""
    how = "pip install 'samlight-jax[demo]'"
    try:
        page = importlib.import_module("samlight_jax.demo_page")
    except ImportError as error:
        raise InputError(f"samlight demo needs gradio ({error}): {how}") from None
    version = page.gr.__version__
    if tuple(map(int, version.split(".")[:2])) < GRADIO:
        least = ".".join(map(str, GRADIO))
        raise InputError(f"samlight demo needs gradio {least} or newer, found {version}: {how}")
    return page


def _examples(folder: Path | None) -> list[Example]:
    """Photographs and their thumbnails; one that cannot be read is named and left out."""
    if folder is None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            return []
        data = Path(spec.origin).parent / "data"
        paths = [data / f"{name}.png" for name in ("astronaut", "chelsea", "coffee")]
        return [(path, _thumbnail(path)) for path in paths if path.exists()]
    if not folder.is_dir():
        raise InputError(f"--examples {folder}: there is no such folder.")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    if len(paths) > MAX_EXAMPLES:
        print(f"of {len(paths)} examples the first {MAX_EXAMPLES} are shown", file=sys.stderr)
    found = []
    for path in paths[:MAX_EXAMPLES]:
        try:
            found.append((path, _thumbnail(path)))
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not found:
        raise InputError(f"--examples {folder}: there is no photograph in it that can be used.")
    return found


def _thumbnail(path: Path) -> Image.Image:
    picture = Image.fromarray(as_array(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def _models(names: tuple[str, ...]) -> tuple[str, ...]:
    """The models to switch between; there is a file for each."""
    if not names:
        here = sorted(filter(_is_there, PRESETS), key=lambda name: name != DEFAULT)
        names = tuple(here) or (DEFAULT,)
    for name in names:
        if not (path := find(name)).exists():
            raise InputError(f"There is no model file {path}.")
    return tuple(dict.fromkeys(names))


def _is_there(name: str) -> bool:
    try:
        return find(name).exists()
    except InputError:
        return False


def _check_address(host: str, port: int) -> None:
    """Refuses what cannot be listened on, before anything else takes its time."""
    if not 0 < port < 1 << 16:
        raise InputError(f"--port {port}: expected 1 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise InputError(
            f"Port {port} of {host} cannot be listened on ({error.strerror}); give another --port "
            "or --host."
        ) from None
