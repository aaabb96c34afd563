"""`samlight demo`: what the page is given, and one sentence with exit code 2 for what cannot be."""

import os
import socket
import sys
import types
import warnings

import pytest
from PIL import Image

from samlight_jax import cli, demo, weights
from tests.models import TINY, random_arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache folder with two models, and folders of photographs."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("minisam", "samlight_t"):
        weights.save(folder / f"{name}.safetensors", random_arrays(TINY), TINY)
    (folder / "damaged.safetensors").write_bytes(b"no model")
    for name in ("photos", "many", "empty"):
        (folder / name).mkdir()
    for path in ("photos/b.png", "photos/a.JPG", *(f"many/{i:02}.png" for i in range(30))):
        Image.new("RGB", (640, 480)).save(folder / path)
    (folder / "photos" / "c.png").write_bytes(b"broken")
    (folder / "photos" / "notes.txt").write_text("no photograph")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs `samlight demo` with a page that only notes what it is given."""
    monkeypatch.setenv("SAMLIGHT_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "keep_compilations", lambda: None)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # pytest's own stay

    def run(*arguments):
        given = []

        def launch(*values):
            given.extend(values)
            blocks = types.SimpleNamespace(local_url="http://here/", block_thread=lambda: None)
            return blocks

        page = types.SimpleNamespace(launch=launch)
        if "--no-gradio" not in arguments:
            monkeypatch.setattr(demo, "_page", lambda: page)
        arguments = [text for text in map(str, arguments) if text != "--no-gradio"]
        monkeypatch.setattr(sys, "argv", ["samlight", "demo", *arguments])
        with warnings.catch_warnings():  # puts `showwarning` back, too
            warnings.simplefilter("always")
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code
        return (code, given, *capsys.readouterr())

    return run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_it_listens_here_alone_with_every_model_of_the_cache(run):
    port = free_port()
    code, (models, _, host, given, temporary), out, _ = run("--port", port)
    assert code == 0 and "http://here/" in out
    assert (models, host, given) == (("samlight_t", "minisam"), "127.0.0.1", port)
    assert not temporary.exists()  # what visitors left is gone
    assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1"


def test_models_may_be_named(run, folder):
    file = str(folder / "samlight_t.safetensors")
    code, (models, *_), _, _ = run(
        *("--port", free_port(), "--model", file, "--model", "minisam", "--model", file)
    )
    assert code == 0 and models == (file, "minisam")


def test_examples_are_the_photographs_of_a_folder(run):
    code, (_, examples, *_), _, err = run("--port", free_port(), "--examples", "photos")
    assert code == 0 and [path.name for path, _ in examples] == ["a.JPG", "b.png"]
    assert all(picture.size == (320, 240) for _, picture in examples)
    assert err.startswith("skipped: photos/c.png is not an image")
    code, (_, examples, *_), _, err = run("--port", free_port(), "--examples", "many")
    assert len(examples) == 24 and err == "of 30 examples the first 24 are shown\n"


def test_without_a_folder_the_examples_are_scikit_images(run, monkeypatch):
    pytest.importorskip("skimage")
    _, (_, examples, *_), _, _ = run("--port", free_port())
    assert [path.stem for path, _ in examples] == ["astronaut", "chelsea", "coffee"]
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    _, (_, examples, *_), _, _ = run("--port", free_port())
    assert examples == []


BAD = [
    (["--model", "samlight_s"], "no released weights of 'samlight_s'"),
    (["--model", "minisam", "--model", "absent.safetensors"], "no model file absent.safetensors"),
    (["--model", "damaged.safetensors"], "damaged.safetensors is not a whole .safetensors file"),
    (["--examples", "absent"], "--examples absent: there is no such folder"),
    (["--examples", "empty"], "--examples empty: there is no photograph in it"),
    (["--port", "0"], "--port 0: expected 1 to 65535"),
    (["--port", "70000"], "--port 70000: expected 1 to 65535"),
    (["--host", "no.such.host.invalid"], "of no.such.host.invalid cannot be listened on"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence_and_code_two(run, arguments, sentence):
    code, given, _, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err and not given


def test_no_model_at_all_says_how_to_get_one(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules["samlight_jax.build_sam"], "PACKAGED", tmp_path)
    code, given, _, err = run()
    assert code == 2 and "is missing; install the package again" in err and not given


def test_a_port_in_use_is_named(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, given, _, err = run("--port", port)
    assert code == 2 and not given and err.count("\n") == 1
    assert f"Port {port} of 127.0.0.1 cannot be listened on (Address already in use" in err


def test_without_gradio_a_sentence_says_how_to_get_it(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "samlight_jax.demo_page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, _, err = run("--no-gradio")
    assert code == 2 and err.count("\n") == 1
    assert "samlight demo needs gradio" in err and "pip install 'samlight-jax[demo]'" in err


@pytest.mark.parametrize(
    ("version", "fits"), [("5.49.1", False), ("6.9.0", False), ("6.31.0", True)]
)
def test_an_old_gradio_is_refused(run, monkeypatch, version, fits):
    page = types.SimpleNamespace(gr=types.SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "samlight_jax.demo_page", page)
    if fits:
        assert demo._page() is page
        return
    code, _, _, err = run("--no-gradio")
    assert code == 2 and f"gradio 6.31 or newer, found {version}: pip install" in err
