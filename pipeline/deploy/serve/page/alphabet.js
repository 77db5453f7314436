// Letters drawn with the browser's own typefaces, laid out as the `glyphs` domain draws them:
// dark on white, on one baseline, centred sideways, shrunk only if too big.

import { asPng, whitePage } from "./pictures.js";

const SIDE = 112;
const EM_SHARE = 0.95;
const BASELINE = 0.74;
const MARGIN = 0.04;

export const ALPHABETS = {
  Greek: [..."αβδλωγθξπφ"],
  Cyrillic: [..."бжфэюдлця"],
  "Latin capitals": [..."AGKRSBEMQ"],
  Digits: [..."2347905168"],
};
const LETTERS_TAUGHT = 5;

const FAMILIES = ["sans-serif", "serif", "monospace"];
const TEACHING_STYLES = [
  ...FAMILIES.map((family) => ["", family]),
  ...FAMILIES.map((family) => ["italic", family]),
  ["bold", "serif"],
];
/** Kept for asking, so that no question is a picture that was taught. */
const ASKING_STYLES = [["bold", "sans-serif"], ["bold italic", "serif"], ["bold", "monospace"]];

/** Classes of an alphabet: the letter and up to `shots` pictures that differ. */
export function lettersToTeach(alphabet, shots) {
  return ALPHABETS[alphabet].slice(0, LETTERS_TAUGHT).map((letter) => {
    const drawn = TEACHING_STYLES.map(([slant, family]) => drawLetter(letter, slant, family));
    // A device with few typefaces draws some styles alike.
    return { letter, pictures: [...new Set(drawn)].slice(0, shots) };
  });
}

/** One new drawing of every label, and one of a letter that was never taught. */
export function lettersToAsk(labels) {
  const taught = new Set(labels);
  const home = Object.values(ALPHABETS).find((a) => a.includes(labels[0])) ?? ALPHABETS.Greek;
  const stranger = home.find((letter) => !taught.has(letter));
  return [...labels, ...(stranger ? [stranger] : [])].map((letter, i) => {
    const [slant, family] = ASKING_STYLES[i % ASKING_STYLES.length];
    return drawLetter(letter, slant, family);
  });
}

export const isLetter = (label) => [...String(label)].length === 1;

export function drawLetter(letter, slant = "", family = "sans-serif") {
  const context = whitePage(SIDE);
  paintLetter(context, letter, slant, family);
  return asPng(context);
}

/** Paint a letter on a white page of any size. */
export function paintLetter(context, letter, slant = "", family = "sans-serif") {
  const side = context.canvas.width;
  const margin = MARGIN * side;
  const at = (em) => {
    context.font = `${slant} ${em}px ${family}`.trim();
    return extent(context.measureText(letter));
  };
  let em = EM_SHARE * side;
  let ink = at(em);
  const room = side - 2 * margin;
  const largest = Math.max(ink.width, ink.height);
  if (largest > room) {
    em *= room / largest;
    ink = at(em);
  }
  const top = Math.min(Math.max(BASELINE * side - ink.above, margin), side - margin - ink.height);
  context.fillStyle = "#000";
  context.fillText(letter, (side - ink.width) / 2 + ink.before, top + ink.above);
}

function extent(metrics) {
  const { actualBoundingBoxLeft: before, actualBoundingBoxRight: after } = metrics;
  const { actualBoundingBoxAscent: above, actualBoundingBoxDescent: below } = metrics;
  return { before, above, width: before + after, height: above + below };
}
