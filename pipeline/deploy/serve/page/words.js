// How numbers and names are put into words.

/** 0.934 -> "93 %"; never a false "100 %" or "0 %". */
export function percent(share) {
  if (share > 0.995 && share < 1) return "over 99 %";
  if (share > 0 && share < 0.005) return "under 1 %";
  return `${Math.round(share * 100)} %`;
}

export function accuracy({ accuracy: mean, ci95 }) {
  const interval = ci95 === undefined || ci95 === null ? "" : ` ± ${(ci95 * 100).toFixed(1)}`;
  return `${(mean * 100).toFixed(1)}${interval} %`;
}

/** "5w1s" -> "5 classes, 1 example each". */
export function setting(code) {
  const found = /^(\d+)w(\d+)s$/.exec(code);
  if (!found) return code;
  return `${count(Number(found[1]), "class", "classes")}, ${count(Number(found[2]), "example")} each`;
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** Which version of which model, shortly. */
export function modelName({ name, version, bundle }) {
  return `${name}, ${versionOf({ version, bundle })}`;
}

export function versionOf({ version, bundle }) {
  return version === null ? `bundle ${bundle.slice(0, 8)}` : `version ${version}`;
}

/** What a learner is called; one without a name goes by its classes. */
export function learnerName(learner) {
  if (learner.name) return learner.name;
  const labels = learner.classes.map((c) => c.label);
  return labels.length > 5 ? `${labels.slice(0, 5).join(", ")} …` : labels.join(", ");
}

export function moment(iso) {
  const time = document.createElement("time");
  time.dateTime = iso;
  time.textContent = new Date(iso).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
  return time;
}
