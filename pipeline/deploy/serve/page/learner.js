// Step 2: the learner that is open, and the shelf of those that are kept.

import { deleteLearner, exportLearner, listLearners, readLearner } from "./api.js";
import { announce, fillFacts, find, make, showProblem, whileBusy } from "./dom.js";
import { count, learnerName, modelName, moment } from "./words.js";

let open = null;
let afterLast = null;
let whenOpened = () => {};

export function setUpLearner({ onOpen }) {
  whenOpened = onOpen;
  find("export").addEventListener("click", (event) =>
    whileBusy(event.currentTarget, find("learner-problem"), exportOpen),
  );
  find("shelf-more").addEventListener("click", (event) =>
    whileBusy(event.currentTarget, find("shelf-problem"), () => readShelf(afterLast)),
  );
}

/** Show a learner in step 2; null shows that there is none. */
export function showLearner(learner, note = "") {
  open = learner;
  find("learner-empty").hidden = Boolean(learner);
  find("learner-facts").hidden = !learner;
  showProblem(find("learner-problem"), null);
  markOpen();
  if (!learner) return;
  find("learner-called").textContent = learnerName(learner);
  find("learner-note").textContent = note;
  find("learner-classes").replaceChildren(
    ...learner.classes.map(({ label, shots }) =>
      make("li", {}, make("strong", {}, String(label)), ` ${count(shots, "example")}`),
    ),
  );
  fillFacts(find("learner-list"), [
    ["Made by", modelName(learner.model)],
    ["Made", moment(learner.created)],
    ["Updates", learner.options.model === "pin" ? "stays with this version" : "follows a new champion"],
    ["Unknown below", learner.unknown_below?.toFixed(2).concat(" similarity")],
    ["Grown from", learner.parent],
    ["Id", make("code", {}, learner.id)],
  ]);
}

async function exportOpen() {
  const learner = open;
  const address = URL.createObjectURL(await exportLearner(learner.id));
  make("a", { href: address, download: `${learner.id}.zip` }).click();
  // The download starts after this turn of the event loop, so the address must outlive it.
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
  announce("The export is in your downloads.");
}

/** Read the shelf anew, or the part after the learner `after`. */
export async function readShelf(after = null) {
  const { learners, next } = await listLearners(after);
  const rows = learners.map(row);
  const before = after ? [...find("shelf").children] : [];
  find("shelf").replaceChildren(...before, ...rows);
  afterLast = next;
  find("shelf-more").hidden = !next;
  find("shelf-empty").hidden = find("shelf").children.length > 0;
  markOpen();
}

function row(learner) {
  const name = learnerName(learner);
  const opener = make("button", { type: "button", className: "quiet" }, "Open");
  const deleter = make("button", { type: "button", className: "quiet" }, "Delete");
  opener.setAttribute("aria-label", `Open ${name}`);
  deleter.setAttribute("aria-label", `Delete ${name}`);
  const problem = find("shelf-problem");
  opener.addEventListener("click", () =>
    whileBusy(opener, problem, async () => whenOpened(await readLearner(learner.id))),
  );
  deleter.addEventListener("click", () => whileBusy(deleter, problem, () => askAndDelete(learner)));
  const facts = `${count(learner.classes.length, "class", "classes")}, ${count(learner.examples, "example")}`;
  const item = make("li", {}, make("p", { className: "called" }, name), opener, deleter);
  item.dataset.id = learner.id;
  opener.before(make("p", { className: "hint" }, facts));
  return item;
}

function markOpen() {
  for (const item of find("shelf").children) {
    if (item.dataset.id === open?.id) item.setAttribute("aria-current", "true");
    else item.removeAttribute("aria-current");
  }
}

async function askAndDelete(learner) {
  const name = learnerName(learner);
  find("confirm-text").textContent = `“${name}” and its pictures will be gone for good.`;
  if ((await answerOf(find("confirm"))) !== "delete") return;
  await deleteLearner(learner.id);
  announce(`Deleted ${name}.`);
  if (open?.id === learner.id) whenOpened(null);
  await readShelf();
  find("shelf-title").focus();
}

function answerOf(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
