// The service's HTTP interface: the key, one request at a time, problems as errors.

const STORED_KEY = "metaloom-key";

/** Something that the user should read: from the service, or on the way to it. */
export class Problem extends Error {
  constructor(message, { status = 0, reference = null } = {}) {
    super(message);
    this.status = status;
    this.reference = reference;
  }
}

/** Take a key from `#key=...`, so that it stays in neither address bar nor history; was there one? */
export function takeKeyFromAddress() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  if (!fragment.has("key")) return false;
  sessionStorage.setItem(STORED_KEY, fragment.get("key"));
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}

export const hasKey = () => Boolean(sessionStorage.getItem(STORED_KEY));
export const keepKey = (key) => sessionStorage.setItem(STORED_KEY, key);
export const forgetKey = () => sessionStorage.removeItem(STORED_KEY);

let keyRefused = () => {};

/** What to do when the service does not know the key (any more). */
export function onKeyRefused(listener) {
  keyRefused = listener;
}

const at = (id) => `/v1/learners/${encodeURIComponent(id)}`;

export const readModel = async () => (await send("GET", "/v1/model")).json();
export const makeLearner = async (body) => {
  const response = await send("POST", "/v1/learners", body);
  return { learner: await response.json(), wasThere: response.status === 200 };
};
export const readLearner = async (id) => (await send("GET", at(id))).json();
export const deleteLearner = (id) => send("DELETE", at(id));
export const exportLearner = async (id) => (await send("GET", `${at(id)}/export`)).blob();
export const readExample = async (id, number) =>
  (await send("GET", `${at(id)}/examples/${number}`)).blob();
export const predict = async (id, queries, against) =>
  (await send("POST", `${at(id)}/predict`, { queries, against })).json();
export const listLearners = async (after = null) => {
  const query = new URLSearchParams({ limit: "20", ...(after ? { after } : {}) });
  return (await send("GET", `/v1/learners?${query}`)).json();
};

async function send(method, path, body) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(STORED_KEY) ?? ""}` };
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Problem("The service cannot be reached. See that it still runs, then try again.");
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (response.status === 401) keyRefused(problem);
  throw problem;
}

const LEADS = {
  401: "This key is not accepted.",
  403: "This key does not allow that.",
  413: "That is too much for one request.",
  429: "The service is busy with many requests.",
  503: "The service is not ready.",
};

/** RFC 9457 problem details as a sentence or two. */
async function problemOf(response) {
  const details = await response.json().catch(() => ({}));
  const said = details.detail || details.title || `The service answered ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  const again = wait > 0 ? `Try again in ${wait} second${wait === 1 ? "" : "s"}.` : "";
  const message = [LEADS[response.status], sentence(said), again].filter(Boolean).join(" ");
  return new Problem(message, { status: response.status, reference: details.request_id ?? null });
}

function sentence(text) {
  const trimmed = text.trim();
  const capital = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
