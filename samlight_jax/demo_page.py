"""The gradio page of `samlight demo`: its layout, and its events over `demo_session.Session`."""

from __future__ import annotations

import base64
import functools
import html
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jax
from gradio.themes import Soft
from PIL import Image

from samlight_jax.demo_session import FILES, Session
from samlight_jax.errors import InputError

HERE = Path(__file__).parent
MAX_UPLOAD = "32mb"
IDLE = 3600  # seconds after which a visitor's photograph is forgotten
MAX_VISITORS = 32  # whose photographs are kept; beyond, the one longest idle is forgotten
STAGE = """<div class="stage empty">
  <img class="photo" draggable="false" alt="the photograph with its masks">
  <div class="band" hidden></div>
  <div class="hint"><b>Open a photograph</b><br>Click, drop or paste one here, or pick an
  example.</div>
</div>"""
# Decoding is one at a time for all visitors; quick clicks wait, none is lost.
IN_TURN = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "trigger_mode": "multiple",
    "api_visibility": "private",
}
START_DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""


def launch(
    models: Sequence[str],
    examples: Sequence[tuple[Path, Image.Image]],
    host: str,
    port: int,
    folder: Path,
) -> Any:
    """Serves the page from a thread of its own.

    Args:
      models: names or paths for `load`; the first one is chosen.
      examples: photographs and their thumbnails.
      host: to listen on.
      port: to listen on.
      folder: for uploads and downloads; gradio removes them an hour later.

    Returns:
      The `gradio.Blocks`.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    with gr.Blocks(
        title="samlight demo", analytics_enabled=False, delete_cache=(600, IDLE)
    ) as blocks:
        _Page(models, examples, folder)
    blocks.queue(max_size=4 * MAX_VISITORS)
    blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=MAX_VISITORS,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        # gradio's own fonts would come from elsewhere
        theme=Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=HERE / "demo_page.css",
    )
    return blocks


class _Page:
    """The components, and what they do."""

    def __init__(
        self,
        models: Sequence[str],
        examples: Sequence[tuple[Path, Image.Image]],
        folder: Path,
    ):
        self.examples = examples
        self.folder = folder
        self.state = gr.State(Session(models[0]), time_to_live=IDLE)
        gr.HTML(
            "<h1>Segment Anything, made light</h1>"
            "<p>Left click: foreground. Right click: background. Drag: a box around it.</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=480):
                self.stage = gr.HTML(
                    "",
                    html_template=STAGE,
                    js_on_load=(HERE / "demo_stage.js").read_text(),
                    elem_id="stage",
                )
                self.status = gr.HTML("", elem_id="status")
            with gr.Column(scale=1, min_width=300):
                self._source(models)
                self._prompt()
                self._results()
        self._wire()

    def _source(self, models: Sequence[str]) -> None:
        """Where photographs and masks come from."""
        self.upload = gr.UploadButton("Open a photograph", variant="primary", elem_id="open")
        self.gallery = gr.Gallery(
            [(picture, path.stem) for path, picture in self.examples],
            label="Examples",
            show_label=False,
            container=False,
            columns=3,
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=bool(self.examples),
            elem_id="examples",
        )
        self.model = gr.Dropdown(list(models), value=models[0], label="Model")

    def _prompt(self) -> None:
        self.kind = gr.Radio(
            [("foreground", True), ("background", False)],
            value=True,
            label="A click marks",
            elem_id="kind",
        )
        self.masks = gr.Radio([], label="Masks, by predicted IoU", elem_id="masks")
        with gr.Row():
            self.undo = gr.Button(
                "Undo", interactive=False, size="md", min_width=80, elem_id="undo"
            )
            self.clear = gr.Button(
                "Clear", interactive=False, size="md", min_width=80, elem_id="clear"
            )
        gr.HTML("All masks, from a grid of points", elem_classes="section")
        with gr.Row(equal_height=True):
            self.grid = gr.Dropdown(
                [(f"{n} x {n}", n) for n in (8, 16, 32)],
                value=16 if jax.default_backend() == "cpu" else 32,
                label="Grid of points",
                show_label=False,
                container=False,
                min_width=120,
            )
            self.everything = gr.Button(
                "Everything", interactive=False, size="md", min_width=120, elem_id="everything"
            )

    def _results(self) -> None:
        gr.HTML("Download", elem_classes="section")
        with gr.Row():
            self.downloads = {
                kind: gr.Button(
                    label, interactive=False, size="md", min_width=80, elem_id=f"save-{kind}"
                )
                for kind, label in zip(FILES, ("Mask", "Overlay", "COCO"), strict=True)
            }
        self.file = gr.DownloadButton(visible=False)

    def _wire(self) -> None:
        self.outputs = [
            *(self.state, self.stage, self.status, self.masks, self.model),
            *(self.undo, self.clear, self.everything, *self.downloads.values()),
        ]
        self._on(self.upload.upload, lambda s, _, path: s.open(Path(path)), self.upload, slow=True)
        self._on(self.gallery.select, lambda s, e: s.open(self.examples[e.index][0]), slow=True)
        self._on(
            self.stage.point,
            lambda s, e, positive: s.add_point(e.x, e.y, positive and not e.right),
            self.kind,
        )
        self._on(self.stage.box, lambda s, e: s.set_box(e.x1, e.y1, e.x2, e.y2))
        self._on(self.undo.click, lambda s, _: s.undo())
        self._on(self.clear.click, lambda s, _: s.clear())
        self._on(self.masks.input, lambda s, _, mask: s.choose(mask), self.masks)
        self._on(self.model.input, lambda s, _: None, slow=True)  # every event uses it
        self._on(self.everything.click, lambda s, _, n: s.find_everything(n), self.grid, slow=True)
        for kind, button in self.downloads.items():
            save = functools.partial(self._save, kind)
            event = button.click(save, self.state, self.file, **IN_TURN)
            event.then(None, self.file, None, js=START_DOWNLOAD)

    def _on(self, event: Any, action: Callable, *inputs: Any, slow: bool = False) -> None:
        """What an event does to the visitor's session; a bad input only says so."""

        def run(data: gr.EventData, session: Session, model: str, *values: Any) -> dict:  # pyright: ignore[reportInvalidTypeForm]
            try:
                session.use(model)
                action(session, data, *values)
            except InputError as error:
                _say(error)
            return self._shown(session)

        event(
            run,
            [self.state, self.model, *inputs],
            self.outputs,
            show_progress="full" if slow else "hidden",
            show_progress_on=self.stage,
            **IN_TURN,
        )

    def _save(self, kind: str, session: Session) -> str | None:
        """The path of a file to download."""
        try:
            return str(session.save(kind, Path(tempfile.mkdtemp(dir=self.folder))))
        except InputError as error:
            _say(error)
            return None

    def _shown(self, session: Session) -> dict:
        """Every output's value for the session as it is."""
        answer = session.answer
        some = answer is not None or session.everything is not None
        scores = [] if answer is None else answer.scores
        choices = [(f"{score:.2f}", i) for i, score in enumerate(scores)]
        masks = gr.Radio(choices=choices, value=session.chosen if choices else None)
        return {
            self.state: session,
            self.stage: _data_url(session.picture()),
            self.status: _status(session),
            self.masks: masks,
            self.model: session.model,
            self.everything: gr.Button(interactive=session.photo is not None),
            **{
                button: gr.Button(interactive=some)
                for button in (self.undo, self.clear, *self.downloads.values())
            },
        }


def _say(error: InputError) -> None:
    gr.Warning(html.escape(str(error)), title="Sorry")


def _status(session: Session) -> str:
    """One line of HTML about what is shown."""
    if session.photo is None:
        return ""
    height, width = session.photo.pixels.shape[:2]
    parts = [f"{html.escape(session.photo.name)}, {width} x {height}"]
    if session.everything is not None:
        scores = [record["predicted_iou"] for record in session.everything]
        parts.append(f"<b>{len(scores)} masks</b>")
        if scores:
            parts.append(f"predicted IoU {min(scores):.2f} to {max(scores):.2f}")
    elif session.answer is not None:
        answer, chosen = session.answer, session.chosen
        parts.append(f"<b>predicted IoU {answer.scores[chosen]:.2f}</b>")
        parts.append(f"{100 * answer.masks[chosen].mean():.1f} % of the photograph")
        parts.append(f"{1e3 * answer.seconds:.0f} ms")
    return " &middot; ".join(parts)


def _data_url(picture: Image.Image | None) -> str:
    """The picture itself, so that it lies in no file that others might find; "" for none."""
    if picture is None:
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
