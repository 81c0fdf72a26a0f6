/** Downloads of what was generated, a link to it, and the same as Python and commands. */

import {$, element, title} from "./player.js";
import {ask, steps} from "./stream.js";

let about, say, settings = null;

/** The buttons below the images, once and for all. */
export function shareButtons(...parts) {
  [about, say] = parts;
  $("link").onclick = () => copy("The link", location.href, settings.image ? " It holds the settings, not the image." : "");
  for (const name of ["python", "command"]) $(name).onclick = () => code(name);
  for (const name of ["image", "mask"]) $(`save-${name}`).onclick = () => save(`${name}.png`, bytes(settings[name]), "image/png");
}

/** From now on what is shared was made with these settings. */
export function share(made) {
  settings = made;
  $("share").hidden = false;
  $("save-image").hidden = !made.image;
  $("save-mask").hidden = !made.mask;
  $("copied").textContent = $("code").textContent = "";
  $("code").hidden = true;
}

async function code(name) {
  try {
    const given = await (await ask("code", settings)).json();
    const files = settings.mask ? "image.png and mask.png" : "image.png";
    copy(name === "python" ? "The Python code" : "The command", given[name], settings.image ? ` It reads ${files}: save them.` : "");
  } catch (error) {
    say(error.message, true);
  }
}

/** Browsers let a page copy on this machine and by https only; elsewhere the text is there to be copied. */
async function copy(what, text, note) {
  $("code").textContent = text;
  $("code").hidden = false;
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  $("copied").textContent = `${what} ${copied ? "is copied" : "could not be copied by the browser: copy the text below"}.${note}`;
}

/** The downloads of one run. */
export function shareRun(run) {
  const kinds = {PNG: png, WebP: run => animation(run, "webp"), GIF: run => animation(run, "gif"), JSON: order};
  const buttons = Object.entries(kinds).map(([name, make]) => {
    const button = element("button", {type: "button", textContent: name, disabled: true});
    button.setAttribute("aria-label", name === "JSON" ? `Download JSON of the order ${title(run.name)}` : `Download ${name} of ${title(run.name)}`);
    button.onclick = () => make(run).catch(error => say(error.message, true));
    return button;
  });
  run.finished = () => buttons.forEach(button => { button.disabled = false; });
  return element("div", {className: "downloads"}, element("span", {textContent: "Download"}), ...buttons);
}

const fileName = (run, suffix) => `${run.name.replace(/\W+/g, "-")}-seed${settings.seed}.${suffix}`;

/** All images in a square, each pixel enlarged so that small images can be seen. */
async function png(run) {
  const {image} = run.frames.at(-1), w = image.naturalWidth / run.n, h = image.naturalHeight;
  const columns = Math.ceil(Math.sqrt(run.n)), scale = Math.max(1, Math.floor(256 / Math.max(w, h)));
  const sheet = element("canvas", {width: columns * w * scale, height: Math.ceil(run.n / columns) * h * scale});
  const pen = sheet.getContext("2d");
  pen.imageSmoothingEnabled = false;
  for (let i = 0; i < run.n; i++)
    pen.drawImage(image, i * w, 0, w, h, i % columns * w * scale, Math.floor(i / columns) * h * scale, w * scale, h * scale);
  save(fileName(run, "png"), bytes(sheet.toDataURL("image/png").split(",")[1]), "image/png");
}

async function animation(run, format) {
  say("Making the animation…");
  const known = run.rank[0].length - run.total;
  const answer = await ask("animation", {image: run.frames.at(-1).png, order: orders(run), grid: run.grid, known, format});
  for await (const step of steps(answer, say)) save(fileName(run, format), bytes(step.file), `image/${format}`);
  say("The animation is saved.");
}

/** Positions of each image in the sequence of their generation; what was given comes first. */
const orders = run => run.rank.map(rank => rank.map((step, position) => [step === Infinity ? -1 : step, position])
  .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(pair => pair[1]));

async function order(run) {
  const {image, mask, orders: all, ...rest} = settings;
  const text = JSON.stringify({
    pipeline: about.name, ...rest, order_name: run.name, grid: run.grid, known: run.rank[0].length - run.total, order: orders(run),
  });
  save(fileName(run, "json"), text, "application/json");
}

const bytes = base64 => Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));

function save(name, content, type) {
  const address = URL.createObjectURL(new Blob([content], {type}));
  element("a", {href: address, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
