// Small helpers around the document: find, build, tell, and say what went wrong.

export const find = (id) => document.getElementById(id);

/** An element with properties and children; text is never parsed as HTML. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A copy of a template's only element. */
export function copyOf(templateId) {
  return find(templateId).content.firstElementChild.cloneNode(true);
}

/** Terms and descriptions of a description list; entries without a value are left out. */
export function fillFacts(list, facts) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined);
  list.replaceChildren(
    ...known.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value))),
  );
}

/** Say something through the live region, for those who do not see what changed. */
export function announce(text) {
  const status = find("status");
  // The same words twice in a row would not be read again.
  status.textContent = status.textContent === text ? `${text}\u00a0` : text;
}

/** Show an error in plain words beside the place where it arose; null takes it away. */
export function showProblem(place, error) {
  place.replaceChildren();
  if (!error) return;
  place.append(error.message);
  if (error.reference) {
    place.append(" ", make("small", {}, `Reference: ${error.reference}`));
  }
}

/** Run work that a button started: once at a time, errors shown at `place`. */
export async function whileBusy(button, place, work) {
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  showProblem(place, null);
  try {
    await work();
  } catch (error) {
    showProblem(place, error);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

/** Bring a section into view and put the keyboard there. */
export function goTo(section) {
  section.focus({ preventScroll: true });
  section.scrollIntoView({ block: "start" });
}

/** Files dropped on `zone` reach `take`. */
export function acceptDrops(zone, take) {
  const mark = (on) => zone.classList.toggle("over", on);
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(true);
  });
  zone.addEventListener("dragleave", (event) => {
    if (!zone.contains(event.relatedTarget)) mark(false);
  });
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(false);
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
}

/** Files chosen with a file input reach `take`; the same file may be chosen again. */
export function acceptChoice(input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) take(files);
  });
}
