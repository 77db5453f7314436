// One answer as a card: the label, how sure, and the support example that decided.

import { readExample } from "./api.js";
import { copyOf, make } from "./dom.js";
import { percent, versionOf } from "./words.js";

/** Pictures of support examples by learner and number; a learner never changes. */
const examples = new Map();

/** The answer of one side ("champion" or "challenger"), or why it has none. */
export function showAnswer({ side, learner, model, prediction, problem }) {
  const card = copyOf("answer");
  const part = (selector) => card.querySelector(selector);
  const title = side === "champion" ? "Champion" : "Challenger";
  part(".by").textContent = model ? `${title}, ${versionOf(model)}` : title;
  if (problem) {
    part(".label").textContent = "No answer";
    part(".why").textContent = problem.message;
    for (const useless of [".evidence", ".confidence", "details"]) part(useless).remove();
    return card;
  }
  card.classList.toggle("unknown", prediction.unknown);
  part(".label").textContent = prediction.unknown ? "Unknown" : String(prediction.label);
  part(".number").textContent = prediction.unknown
    ? `${percent(prediction.confidence)} for ${prediction.probabilities[0].label}, if it were one of them`
    : `${percent(prediction.confidence)} sure`;
  part(".bar span").style.width = `${100 * prediction.confidence}%`;
  part(".why").textContent = reason(prediction, learner);
  part(".odds").append(...prediction.probabilities.map(odds));
  showEvidence(part(".evidence"), prediction, learner);
  return card;
}

/** The same answer for the live region. */
export function spoken(prediction) {
  if (prediction.unknown) return "unknown";
  const [nearest] = prediction.nearest;
  const decided = nearest ? `, decided by example ${nearest.example + 1}, ${nearest.label}` : "";
  return `${prediction.label}, ${percent(prediction.confidence)} sure${decided}`;
}

function reason({ unknown, nearest: [first] }, learner) {
  if (!first) return "";
  const similar = first.similarity.toFixed(2);
  if (!unknown) return `Most like this example of ${first.label}: similarity ${similar}.`;
  const needed = learner.unknown_below === null ? "" : `; it takes ${learner.unknown_below.toFixed(2)}`;
  return `Too little like any example. The closest is of ${first.label}, similarity ${similar}${needed}.`;
}

function odds({ label, probability }) {
  return make("div", {}, make("dt", {}, String(label)), make("dd", {}, percent(probability)));
}

async function showEvidence(figure, prediction, learner) {
  const [first] = prediction.nearest;
  if (!first) return figure.remove();
  figure.querySelector("figcaption").textContent = prediction.unknown ? "Closest" : "Decided by";
  const frame = figure.querySelector(".frame");
  try {
    const src = await exampleAddress(learner.id, first.example);
    const alt = `Example ${first.example + 1}, ${first.label}`;
    frame.append(make("img", { src, alt }));
  } catch {
    // Examples sent as numbers have no picture; the words beside it still say which one it was.
    frame.append(make("span", {}, `Example ${first.example + 1}`));
  }
}

function exampleAddress(id, number) {
  const place = `${id}/${number}`;
  if (!examples.has(place)) {
    const address = readExample(id, number).then((blob) => URL.createObjectURL(blob));
    examples.set(place, address);
    address.catch(() => examples.delete(place));
  }
  return examples.get(place);
}
