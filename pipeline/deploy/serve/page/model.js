// The model's card in short: what was measured, what it takes, what it may be asked.

import { fillFacts, find, make } from "./dom.js";
import { accuracy, count, modelName, setting, versionOf } from "./words.js";

export function showModel({ champion, challenger, limits, refused }) {
  find("model").replaceChildren(
    make("h3", {}, "Champion"),
    facts(champion),
    measured(champion.evaluation),
    ...(challenger ? [make("h3", {}, "Challenger"), facts(challenger), measured(challenger.evaluation)] : []),
    ...(challenger ? [] : [make("p", { className: "hint" }, "No challenger at the moment.")]),
    make("h3", {}, "Limits"),
    limitsOf(limits),
    ...refusedOf(refused ?? []),
  );
}

function facts(model) {
  const list = make("dl", { className: "facts" });
  const { kind, channels, height, width } = model.input;
  const colour = channels === 1 ? "grey" : "colour";
  fillFacts(list, [
    ["Model", modelName(model)],
    ["Algorithm", model.algorithm],
    ["Sees", kind === "image" ? `${height} × ${width} pixels, ${colour}` : kind],
  ]);
  return list;
}

/** Accuracy by setting, each with the half-width of its 95 % interval. */
function measured(evaluation) {
  const rows = Object.entries(evaluation ?? {});
  if (!rows.length) return make("p", { className: "hint" }, "No accuracy is recorded.");
  const table = make("table");
  table.append(make("caption", {}, "Accuracy on test episodes, with its 95 % interval"));
  for (const [code, numbers] of rows) {
    const head = make("th", { scope: "row" }, setting(code));
    table.append(make("tr", {}, head, make("td", {}, accuracy(numbers))));
  }
  return table;
}

function limitsOf(limits) {
  const list = make("dl", { className: "facts" });
  fillFacts(list, [
    ["Classes", `2 to ${limits.ways}`],
    ["Examples", `up to ${limits.shots} a class`],
    ["Questions", `${limits.queries} a request`],
    ["Pictures", `${limits.pixels / 1e6} megapixels, ${limits.side.toLocaleString("en")} a side`],
    ["Request", `${limits.body_bytes / 1e6} MB`],
  ]);
  return list;
}

/** Versions that the service would not take. */
function refusedOf(refused) {
  if (!refused.length) return [];
  const items = refused.map(({ version, why }) =>
    make("li", {}, make("strong", {}, versionOf({ version, bundle: "" })), `: ${why}`),
  );
  return [
    make("h3", {}, `Refused: ${count(refused.length, "version")}`),
    make("ul", { className: "refused" }, ...items),
  ];
}
