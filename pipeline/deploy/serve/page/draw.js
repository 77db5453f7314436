// The drawing pad: one dialog for examples and questions, by pointer or by typing a character.

import { paintLetter } from "./alphabet.js";
import { find } from "./dom.js";
import { asPng } from "./pictures.js";

/** About the width of a letter's stem in the training pictures. */
const STROKE_SHARE = 0.08;

const pad = { strokes: [], letter: "", onAdd: null, several: false };
let context;

export function setUpPad() {
  context = find("pad-canvas").getContext("2d");
  followPointer(find("pad-canvas"));
  find("pad-undo").addEventListener("click", () => {
    pad.strokes.pop();
    repaint();
  });
  find("pad-clear").addEventListener("click", clear);
  find("pad-letter").addEventListener("input", (event) => {
    pad.letter = [...event.target.value.trim()].at(-1) ?? "";
    pad.strokes = [];
    repaint();
  });
  find("pad-add").addEventListener("click", add);
  find("pad-done").addEventListener("click", () => find("pad").close());
  find("pad-form").addEventListener("submit", (event) => {
    // Enter in the text field adds; only Done and Escape close.
    event.preventDefault();
    add();
  });
}

/** Open the pad; `onAdd` gets each picture. With `several` it stays open for more. */
export function openPad({ title, several, onAdd }) {
  Object.assign(pad, { onAdd, several });
  find("pad-title").textContent = title;
  find("pad-add").textContent = several ? "Add" : "Ask";
  find("pad-status").textContent = "";
  clear();
  // Who came by keyboard goes on by keyboard; a phone's keyboard must not cover the drawing area.
  const byKeyboard = document.activeElement.matches(":focus-visible");
  find("pad").showModal();
  (byKeyboard ? find("pad-letter") : find("pad-title")).focus();
}

function add() {
  if (!pad.strokes.length && !pad.letter) {
    find("pad-status").textContent = "Nothing is drawn yet.";
    return;
  }
  const refused = pad.onAdd(asPng(context));
  if (!pad.several) return find("pad").close();
  find("pad-status").textContent = refused ?? "Added. Draw another one, or press Done.";
  if (!refused) clear();
}

function clear() {
  pad.strokes = [];
  pad.letter = "";
  find("pad-letter").value = "";
  repaint();
}

function followPointer(canvas) {
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    pad.letter = "";
    find("pad-letter").value = "";
    pad.strokes.push([point(event)]);
    repaint();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId) || !pad.strokes.length) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    pad.strokes.at(-1).push(...(passed.length ? passed : [event]).map(point));
    repaint();
  });
}

function repaint() {
  const { width, height } = context.canvas;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  if (pad.letter) paintLetter(context, pad.letter);
  context.strokeStyle = "#000";
  context.lineWidth = STROKE_SHARE * width;
  context.lineCap = context.lineJoin = "round";
  pad.strokes.forEach(paintStroke);
}

/** A smooth line through the middles between points; a single point is a dot. */
function paintStroke(points) {
  context.beginPath();
  context.moveTo(...points[0]);
  for (let i = 1; i < points.length - 1; i += 1) {
    const [x, y] = points[i];
    const [nextX, nextY] = points[i + 1];
    context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
  }
  context.lineTo(...points.at(-1));
  context.stroke();
}
