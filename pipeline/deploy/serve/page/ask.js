// Step 3: new pictures in, answers out, from the champion alone or beside the challenger.

import { isLetter, lettersToAsk } from "./alphabet.js";
import { showAnswer, spoken } from "./answers.js";
import { predict } from "./api.js";
import { acceptChoice, acceptDrops, announce, copyOf, find, showProblem, whileBusy } from "./dom.js";
import { openPad } from "./draw.js";
import { readFiles } from "./pictures.js";
import { versionOf } from "./words.js";

/** What else a request holds beside its pictures. */
const ENVELOPE_BYTES = 1000;
const BYTES_A_QUERY = 20;
const MOST_READ_OUT = 6;

let learner = null;
let limits = { queries: 100, body_bytes: 10_000_000 };
let asked = 0;
let turn = Promise.resolve();
let known = [];
let whenNewModel = () => {};

export function setUpAsk({ onNewModel }) {
  whenNewModel = onNewModel;
  find("ask-draw").addEventListener("click", () =>
    openPad({ title: "Draw a question", several: false, onAdd: (picture) => void ask([picture]) }),
  );
  acceptChoice(find("ask-files"), askFiles);
  acceptDrops(find("ask-drop"), askFiles);
  find("ask-letters").addEventListener("click", () =>
    ask(lettersToAsk(learner.classes.map((c) => String(c.label)))),
  );
  find("clear-results").addEventListener("click", () => {
    clearResults();
    find("ask").focus();
  });
}

/** Whom to compare with, said plainly when there is nobody. */
export function setAskModel(model) {
  limits = model.limits;
  const { champion, challenger } = model;
  known = [champion.bundle, challenger?.bundle];
  find("compare").disabled = !challenger;
  if (!challenger) find("compare").checked = false;
  find("compare-note").textContent = challenger
    ? `Challenger: ${versionOf(challenger)}.`
    : "There is no challenger at the moment; the champion answers alone.";
}

/** Ask this learner from now on; answers of another one are taken away. */
export function setAskLearner(opened) {
  learner = opened;
  clearResults();
  showProblem(find("ask-problem"), null);
  find("ask-empty").hidden = Boolean(opened);
  find("ask-tools").hidden = !opened;
  find("ask-letters").hidden = !opened?.classes.every((c) => isLetter(c.label));
}

function clearResults() {
  asked = 0;
  find("results").replaceChildren();
  find("clear-results").hidden = true;
}

async function askFiles(files) {
  const { pictures, problem } = await readFiles(files);
  if (pictures.length) await ask(pictures);
  if (problem) showProblem(find("ask-problem"), problem);
}

/** Ask about pictures, after those that came before. */
function ask(pictures) {
  const sides = find("compare").checked ? ["champion", "challenger"] : ["champion"];
  turn = turn.then(() =>
    whileBusy(find("ask-drop"), find("ask-problem"), async () => {
      for (const batch of batches(pictures)) await askBatch(batch, sides);
    }),
  );
  return turn;
}

/** Requests that the service's limits allow. */
function batches(pictures) {
  const found = [[]];
  let bytes = ENVELOPE_BYTES;
  for (const picture of pictures) {
    const more = picture.length + BYTES_A_QUERY;
    if (found.at(-1).length >= limits.queries || bytes + more > limits.body_bytes) {
      found.push([]);
      bytes = ENVELOPE_BYTES;
    }
    found.at(-1).push(picture);
    bytes += more;
  }
  return found.filter((batch) => batch.length);
}

async function askBatch(pictures, sides) {
  const whom = learner;
  const queries = pictures.map((image) => ({ image }));
  const replies = await Promise.allSettled(sides.map((side) => predict(whom.id, queries, side)));
  if (whom !== learner) return;
  // One side's failure is shown in its column; when nobody answers, the error stands alone.
  if (replies.every((reply) => reply.status === "rejected")) throw replies[0].reason;
  const words = pictures.map((picture, i) => showResult(picture, i, sides, replies));
  announce(words.length > MOST_READ_OUT ? `${words.length} answers are in the list.` : words.join(" "));
  if (replies.some((reply) => !known.includes(reply.value?.model.bundle))) whenNewModel();
  find("clear-results").hidden = false;
}

function showResult(picture, i, sides, replies) {
  asked += 1;
  const card = copyOf("result-card");
  const image = card.querySelector(".question img");
  Object.assign(image, { src: picture, alt: `Question ${asked}` });
  const answers = card.querySelector(".answers");
  const words = sides.map((side, s) => {
    const { value, reason } = replies[s];
    const prediction = value?.predictions[i];
    answers.append(showAnswer({ side, learner, model: value?.model, prediction, problem: reason }));
    return prediction ? `${sides.length > 1 ? `${side}: ` : ""}${spoken(prediction)}` : `${side}: no answer`;
  });
  find("results").prepend(card);
  return `Question ${asked}: ${words.join("; ")}.`;
}
