// Pictures on their way to the service: read, made small, laid over white, encoded as PNG.

import { Problem } from "./api.js";

const MOST_PIXELS_A_SIDE = 512;
const FEWEST_PIXELS_A_SIDE = 128;
const OVERSAMPLING = 8;

let side = MOST_PIXELS_A_SIDE;

/** Send no more detail than the model can use, so that many photographs fit into one request. */
export function fitToModel(input) {
  const wanted = OVERSAMPLING * Math.max(input.height ?? 0, input.width ?? 0);
  side = Math.min(MOST_PIXELS_A_SIDE, Math.max(FEWEST_PIXELS_A_SIDE, wanted));
}

/** Data URLs of those files that are pictures, and one error that names the others, or null. */
export async function readFiles(files) {
  const read = await Promise.allSettled(files.map(readFile));
  const pictures = read.filter((r) => r.status === "fulfilled").map((r) => r.value);
  const refused = files.filter((_, i) => read[i].status === "rejected").map((f) => `“${f.name}”`);
  const problem = refused.length
    ? new Problem(`Not a picture that this browser can read: ${refused.join(", ")}. Use PNG or JPEG.`)
    : null;
  return { pictures, problem };
}

async function readFile(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const context = whitePage(width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return asPng(context);
}

/** A drawing context whose page is white, as in the pictures that models are trained on. */
export function whitePage(width, height = width) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  return context;
}

export const asPng = (context) => context.canvas.toDataURL("image/png");
