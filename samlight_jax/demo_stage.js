// The stage of `samlight demo`, run by gradio with `element`, `props`, `trigger` and `watch`.
// A click is a point, a drag a box; positions are shares of the photograph, 0 to 1.

const DRAG = 6; // pixels of the screen that tell a drag from a click
const stage = element.querySelector(".stage");
const photo = element.querySelector(".photo");
const band = element.querySelector(".band");
let start = null; // of the click or drag that is under way

function place(event) {
  const frame = photo.getBoundingClientRect();
  const share = (value, from, size) => Math.min(Math.max((value - from) / size, 0), 1);
  return {
    x: share(event.clientX, frame.left, frame.width),
    y: share(event.clientY, frame.top, frame.height),
  };
}

function drags(event) {
  const far = Math.hypot(event.clientX - start.event.clientX, event.clientY - start.event.clientY);
  return start.event.button === 0 && far >= DRAG;
}

function end() {
  start = null;
  band.hidden = true;
}

photo.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 && event.button !== 2) return;
  event.preventDefault();
  photo.setPointerCapture(event.pointerId);
  start = { event, ...place(event) };
});

photo.addEventListener("pointermove", (event) => {
  if (!start || !drags(event)) return;
  const { x, y } = place(event);
  const percent = (value) => `${100 * value}%`;
  band.style.left = percent(Math.min(start.x, x));
  band.style.top = percent(Math.min(start.y, y));
  band.style.width = percent(Math.abs(start.x - x));
  band.style.height = percent(Math.abs(start.y - y));
  band.hidden = false;
});

photo.addEventListener("pointerup", (event) => {
  if (!start) return;
  const { x, y } = place(event);
  if (drags(event)) trigger("box", { x1: start.x, y1: start.y, x2: x, y2: y });
  else trigger("point", { x, y, right: start.event.button === 2 });
  end();
});

photo.addEventListener("pointercancel", end);
photo.addEventListener("contextmenu", (event) => event.preventDefault());

watch("value", () => {
  stage.classList.toggle("empty", !props.value);
  if (props.value) photo.src = props.value;
});
photo.addEventListener("load", () => {
  stage.style.setProperty("--ratio", photo.naturalWidth / photo.naturalHeight);
});

// Files come in through the page's one upload button, however they are chosen.
const chooser = () => document.querySelector("input[type=file]");

function take(files) {
  if (!files.length) return;
  const one = new DataTransfer();
  one.items.add(files[0]);
  chooser().files = one.files;
  chooser().dispatchEvent(new Event("change", { bubbles: true }));
}

stage.addEventListener("click", () => stage.classList.contains("empty") && chooser().click());
stage.addEventListener("dragover", (event) => event.preventDefault());
stage.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input:not([type=radio]), textarea");
  if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || typing) return;
  event.preventDefault();
  document.querySelector("#undo").click();
});
