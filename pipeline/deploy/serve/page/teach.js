// Step 1: classes with names and example pictures, made into a learner.

import { ALPHABETS, lettersToTeach } from "./alphabet.js";
import { Problem, makeLearner } from "./api.js";
import { acceptChoice, acceptDrops, announce, copyOf, find, make, showProblem, whileBusy } from "./dom.js";
import { openPad } from "./draw.js";
import { readFiles } from "./pictures.js";
import { count } from "./words.js";

const cards = [];
let limits = { ways: 20, shots: 20 };

export function setUpTeach({ onMade }) {
  find("alphabet").append(...Object.keys(ALPHABETS).map((name) => make("option", {}, name)));
  find("alphabet-form").addEventListener("submit", (event) => {
    event.preventDefault();
    fillIn(find("alphabet").value, Number(find("alphabet-shots").value));
  });
  find("add-class").addEventListener("click", () => addCard()?.name.focus());
  find("make-form").addEventListener("submit", (event) => {
    event.preventDefault();
    whileBusy(find("make"), find("teach-problem"), () => send(onMade));
  });
  addCard();
  addCard();
}

export function setTeachLimits(known) {
  limits = known;
}

function fillIn(alphabet, shots) {
  showProblem(find("teach-problem"), null);
  for (const card of cards.filter((c) => !c.name.value.trim() && !c.pictures.length)) drop(card);
  const letters = lettersToTeach(alphabet, shots);
  for (const { letter, pictures } of letters) {
    const card = cards.find((c) => c.name.value.trim() === letter) ?? addCard(letter);
    if (!card) break;
    addPictures(card, pictures);
  }
  announce(`Filled in ${letters.map((l) => l.letter).join(", ")}.`);
}

function addCard(name = "") {
  if (cards.length >= limits.ways) {
    showProblem(find("teach-problem"), new Problem(`A learner holds at most ${limits.ways} classes.`));
    return null;
  }
  const root = copyOf("class-card");
  const part = (selector) => root.querySelector(selector);
  const card = { root, name: part(".name"), problem: part(".problem"), pictures: [] };
  card.name.value = name;
  card.name.addEventListener("input", tell);
  part(".draw").addEventListener("click", () => draw(card));
  part(".remove").addEventListener("click", () => remove(card));
  const take = (files) => addFiles(card, files);
  acceptChoice(part("input[type=file]"), take);
  acceptDrops(root, take);
  cards.push(card);
  find("classes").append(root);
  tell();
  return card;
}

function drop(card) {
  cards.splice(cards.indexOf(card), 1);
  card.root.remove();
  tell();
}

function remove(card) {
  const next = cards[cards.indexOf(card) + 1] ?? cards[cards.indexOf(card) - 1];
  announce(`Removed ${titleOf(card)}.`);
  drop(card);
  (next?.name ?? find("add-class")).focus();
}

const titleOf = (card) => card.name.value.trim() || `class ${cards.indexOf(card) + 1}`;

function draw(card) {
  openPad({
    title: `Draw an example of ${titleOf(card)}`,
    several: true,
    onAdd: (picture) => addPictures(card, [picture]),
  });
}

async function addFiles(card, files) {
  const { pictures, problem } = await readFiles(files);
  const refused = addPictures(card, pictures);
  showProblem(card.problem, problem ?? (refused ? new Problem(refused) : null));
}

/** Add what is not there yet; returns what to tell the user if some had to be left out. */
function addPictures(card, pictures) {
  showProblem(card.problem, null);
  const fresh = pictures.filter((picture) => !card.pictures.includes(picture));
  const kept = fresh.slice(0, Math.max(0, limits.shots - card.pictures.length));
  card.pictures.push(...kept);
  showPictures(card);
  if (kept.length) announce(`${titleOf(card)}: ${count(card.pictures.length, "example")}.`);
  if (kept.length < fresh.length) return `A class holds at most ${limits.shots} examples.`;
  return fresh.length < pictures.length ? "That picture is there already." : null;
}

function showPictures(card) {
  const tiles = card.pictures.map((picture, i) => {
    const remover = make("button", { type: "button", className: "cross" }, "×");
    remover.addEventListener("click", () => removePicture(card, i));
    const title = titleOf(card);
    remover.setAttribute("aria-label", `Remove example ${i + 1} of ${title}`);
    const image = make("img", { src: picture, alt: `Example ${i + 1} of ${title}` });
    return make("li", {}, image, remover);
  });
  card.root.querySelector(".pictures").replaceChildren(...tiles);
  tell();
}

function removePicture(card, i) {
  card.pictures.splice(i, 1);
  showPictures(card);
  const left = card.root.querySelectorAll(".cross");
  (left[Math.min(i, left.length - 1)] ?? card.root.querySelector(".draw")).focus();
}

/** How much there is to teach, in words. */
function tell() {
  for (const [i, card] of cards.entries()) {
    const title = titleOf(card);
    card.root.querySelector(".draw").setAttribute("aria-label", `Draw an example of ${title}`);
    card.root.querySelector(".remove").setAttribute("aria-label", `Remove ${title}`);
    card.root.querySelector("input[type=file]").setAttribute("aria-label", `Files for ${title}`);
    card.root.querySelector(".pictures").setAttribute("aria-label", `Examples of class ${i + 1}`);
  }
  const filled = cards.filter((c) => c.pictures.length);
  const examples = filled.reduce((sum, c) => sum + c.pictures.length, 0);
  find("tally").textContent = examples
    ? `${count(filled.length, "class", "classes")} with ${count(examples, "example")} so far.`
    : "";
}

async function send(onMade) {
  const classes = cards.filter((c) => c.name.value.trim() || c.pictures.length);
  check(classes);
  const support = classes.flatMap((c) =>
    c.pictures.map((image) => ({ image, label: c.name.value.trim() })),
  );
  const name = find("learner-name").value.trim();
  onMade(await makeLearner({ ...(name ? { name } : {}), support }));
}

/** What the service would refuse, said before anything is sent and at the place to mend it. */
function check(classes) {
  if (classes.length < 2) {
    throw new Problem("A learner needs at least two classes with an example each.");
  }
  const seen = new Set();
  for (const card of classes) {
    const name = card.name.value.trim();
    const wrong = !name
      ? "Give this class a name."
      : seen.has(name)
        ? `Another class is called “${name}” already. Choose a different name.`
        : !card.pictures.length
          ? `“${name}” has no examples yet. Draw one, or add a file.`
          : null;
    if (wrong) {
      showProblem(card.problem, new Problem(wrong));
      card.name.focus();
      throw new Problem("One class is not ready; see the note there.");
    }
    showProblem(card.problem, null);
    seen.add(name);
  }
}
