// The page: lets people in with a key, and carries a learner from step to step.

import { forgetKey, hasKey, keepKey, onKeyRefused, readModel, takeKeyFromAddress } from "./api.js";
import { setAskLearner, setAskModel, setUpAsk } from "./ask.js";
import { announce, find, goTo, make, showProblem, whileBusy } from "./dom.js";
import { setUpPad } from "./draw.js";
import { readShelf, setUpLearner, showLearner } from "./learner.js";
import { showModel } from "./model.js";
import { fitToModel } from "./pictures.js";
import { setTeachLimits, setUpTeach } from "./teach.js";
import { learnerName } from "./words.js";

function openLearner(learner, note = "") {
  showLearner(learner, note);
  setAskLearner(learner);
  markStep(learner ? "ask" : "teach");
  if (!learner) return;
  goTo(find("learner"));
  announce(`${note || "Opened."} ${learnerName(learner)} is ready to be asked.`);
  refreshModel();
}

function learnerMade({ learner, wasThere }) {
  const note = wasThere ? "This very learner was kept already; here it is." : "Made just now.";
  openLearner(learner, note);
  readShelf().catch((error) => showProblem(find("shelf-problem"), error));
}

function markStep(name) {
  for (const link of find("steps").querySelectorAll("a")) {
    const current = link.hash === `#${name}`;
    if (current) link.setAttribute("aria-current", "step");
    else link.removeAttribute("aria-current");
  }
}

function showDoor(problem = null) {
  forgetKey();
  for (const id of ["workshop", "steps", "forget-key"]) find(id).hidden = true;
  find("door").hidden = false;
  find("key").value = "";
  find("key").focus();
  showProblem(find("key-problem"), problem);
}

function useModel(model) {
  fitToModel(model.champion.input);
  setTeachLimits(model.limits);
  setAskModel(model);
  showModel(model);
}

/** The champion may have changed since the page was opened; an old card is better than none. */
const refreshModel = () => readModel().then(useModel, () => {});

async function enter() {
  useModel(await readModel());
  find("door").hidden = true;
  for (const id of ["workshop", "steps", "forget-key"]) find(id).hidden = false;
  await readShelf().catch((error) => showProblem(find("shelf-problem"), error));
}

/** The first look at the service; one that is still loading may be asked again. */
async function begin() {
  try {
    await enter();
  } catch (error) {
    if (error.status === 401) return;
    const again = make("button", { type: "button" }, "Try again");
    const note = make("section", { className: "sheet door" });
    const text = make("p", { className: "problem" });
    text.setAttribute("role", "alert");
    note.append(text, again);
    find("main").append(note);
    showProblem(text, error);
    again.addEventListener("click", () => {
      note.remove();
      begin();
    });
  }
}

function setUpDoor() {
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey(find("key").value.trim());
    whileBusy(event.submitter ?? find("key-form"), find("key-problem"), async () => {
      await enter();
      goTo(find("teach"));
    });
  });
  find("forget-key").addEventListener("click", () => showDoor());
  onKeyRefused(showDoor);
}

// A picture dropped beside its place must not replace the page.
for (const kind of ["dragover", "drop"]) {
  window.addEventListener(kind, (event) => event.preventDefault());
}
// An address with a new key, opened in this very tab, does not load the page again.
window.addEventListener("hashchange", () => takeKeyFromAddress() && begin());
takeKeyFromAddress();
setUpDoor();
setUpPad();
setUpTeach({ onMade: learnerMade });
setUpLearner({ onOpen: (learner) => openLearner(learner) });
setUpAsk({ onNewModel: refreshModel });
markStep("teach");
if (hasKey()) begin();
else showDoor();
