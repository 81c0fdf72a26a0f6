/** The form, the address, and one request for images at a time. */

import {Editor} from "./editor.js";
import {$, Player, element, title} from "./player.js";
import {share, shareButtons} from "./share.js";
import {ask, steps} from "./stream.js";

const form = $("form"), field = form.elements;
const FIELDS = ["task", "class_labels", "prompt", "num_images", "seed", "temperature", "guidance_scale", "keep"];
const GENERATING = "Generating…";
let about, editor, player, request = null, shown = null;

// --- the form -----------------------------------------------------------------------------------------

function fillForm() {
  const [h, w] = about.image, [rows, columns] = about.grid;
  const good = about.orders.filter(order => order.good), others = about.orders.filter(order => !order.good);
  $("summary").textContent = `${about.name}: ${h} × ${w} pixels in ${rows} × ${columns} patches, made for `
    + good.map(order => title(order.name)).join(", ");
  $("pipeline").textContent = about.pipeline;
  const options = about.classes.map(name => element("option", {value: name, textContent: name}));
  field.class_labels.append(...options, element("option", {value: "", textContent: "none: whatever comes"}));
  field.class_labels.value = about.example_class;
  $("class-field").hidden = !options.length;
  $("text-field").hidden = !about.takes_text;
  $("guidance-field").hidden = !options.length && !about.takes_text;
  $("weak").hidden = about.completes;
  field.num_images.max = about.max_images;
  field.guidance_scale.max = Math.max(8, 2 * about.guidance);
  field.guidance_scale.value = about.guidance;
  field.temperature.value = about.temperature;
  $("good").append(...good.map(chip));
  $("others").append(...others.map(chip));
  $("experiments").hidden = !others.length;
  $("why").textContent = (others.find(order => order.token_blind) ?? others[0])?.why ?? "";
}

function chip(order) {
  order.text = order.text.replaceAll("`", "");
  const box = element("input", {type: "checkbox", name: "orders", value: order.name});
  box.setAttribute("form", "form");
  const made = element("label", {className: "chip"}, box, element("span", {textContent: title(order.name)}));
  made.onmouseenter = box.onfocus = () => { $("explain").textContent = `${title(order.name)}: ${order.text} ${order.why}`; };
  return made;
}

const OPENED = 2;  // orders side by side on opening: more keep the first images waiting
const boxes = () => [...document.querySelectorAll("[name=orders]")];
const editing = () => field.task.value === "edit";

/** Settings come from the address, so that a view can be kept and shared; what cannot be set is an error. */
function readAddress() {
  const given = new URLSearchParams(location.search), names = about.orders.map(order => order.name);
  const wanted = given.has("orders") ? given.getAll("orders") : about.orders.filter(order => order.good).map(order => order.name).slice(0, OPENED);
  for (const box of boxes()) box.checked = wanted.slice(0, about.max_orders).includes(box.value);
  $("experiments").open = about.orders.some(order => !order.good && wanted.includes(order.name));
  const wrong = wanted.filter(name => !names.includes(name)).map(name => `unknown order '${name}'`);
  if (given.has("orders") && wanted.length > about.max_orders) wrong.push(`at most ${about.max_orders} orders, got ${wanted.length}`);
  for (const [name, value] of given) {
    if (FIELDS.includes(name)) field[name].value = value;
    if (name === "class_labels" && field.class_labels.value !== value) wrong.push(`unknown class '${value}', choose one of the list`);
    else if (FIELDS.includes(name) ? field[name].value !== value : name !== "orders") wrong.push(`${name}=${value} is not possible`);
  }
  if (wrong.length) throw new Error(`The address asks for what is not there: ${wrong.join("; ")}.`);
}

function showSettings() {
  for (const name of ["num_images", "temperature", "guidance_scale"]) {
    const value = +field[name].value;
    field[name].closest("label").querySelector("output").textContent = name === "guidance_scale" && value === 1 ? "off" : value;
  }
  field.guidance_scale.disabled = field.class_labels.value === "" && field.prompt.value === "";
  const chosen = boxes().filter(box => box.checked).length;
  for (const box of boxes()) box.disabled = !box.checked && chosen >= about.max_orders;
  $("chosen").textContent = `${chosen} of at most ${about.max_orders}`;
  $("editor").hidden = !editing();
  if (editing()) editor.fit();
  $("stale").hidden = !shown || request || shown.view === view();
  $("panels").classList.toggle("stale", !$("stale").hidden);
}

function query() {
  const found = new URLSearchParams(new FormData(form));
  if (!editing()) found.delete("keep");
  return found;
}

/** Everything that the images depend on. */
const view = () => `${query()}${editing() ? editor.version : ""}`;

/** The settings as the server takes them. */
function settings(asked) {
  const {task, keep, ...values} = Object.fromEntries(asked);
  const given = task !== "edit" ? {} : {image: editor.imageFile(), ...keep ? {keep} : {mask: editor.maskFile()}};
  return {...values, orders: asked.getAll("orders"), ...given};
}

// --- generation ---------------------------------------------------------------------------------------

async function draw() {
  request?.abort();
  const mine = request = new AbortController(), asked = query();
  if (!asked.has("orders")) return stop("Choose at least one order.");
  if (editing() && editor.empty) return stop("Choose an image to edit first.");
  if (editing() && asked.get("keep") && editor.border.some(patches => patches)) return stop("Variations have no border: set it to 0, or paint what is to be generated.");
  if (editing() && !asked.get("keep") && !editor.painted) return stop("Paint first what is to be generated.");
  $("draw").textContent = "Stop";
  try {
    const now = {view: view(), settings: settings(asked), grid: editing() ? editor.grid : about.grid};
    const answer = await ask("draw", now.settings, mine.signal);
    history.replaceState(null, "", `?${asked}`);
    shown = now;
    player.begin(shown.settings.orders, +asked.get("num_images"), shown.grid);
    share(shown.settings);
    showSettings();
    say(GENERATING);
    for await (const step of steps(answer, say)) {
      player.take(step);
      if ($("status").textContent !== GENERATING) say(GENERATING);
    }
    const {runs} = player, count = runs.length * runs[0].n;
    say(`Done: ${count} image${count > 1 ? "s" : ""}, ${runs[0].total} patches each, seed ${asked.get("seed")}.`);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    if (request === mine) stop();
  }
}

function stop(mistake) {
  request = null;
  $("draw").textContent = "Generate";
  if (mistake) say(mistake, true);
  showSettings();
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").className = wrong ? "error" : "";
}

function edit(canvas) {
  field.task.value = "edit";
  showSettings();
  editor.load(canvas);
  $("editor").scrollIntoView({block: "nearest"});
}

// --- wiring -------------------------------------------------------------------------------------------

form.onsubmit = event => {
  event.preventDefault();
  if (request) { request.abort(); say("Stopped."); } else draw();
};
$("next").onclick = () => { field.seed.value = +field.seed.value + +field.num_images.value; draw(); };

(async () => {
  try {
    about = await (await ask("about")).json();
    player = new Player(about, edit);
    editor = new Editor(about, () => showSettings(), text => say(text, true));
    shareButtons(about, say);
    fillForm();
    document.addEventListener("input", showSettings);
    readAddress();
  } catch (error) {
    return say(error.message, true);
  } finally {
    if (about) showSettings();
  }
  if (!editing()) draw();
  else say("Choose the image to edit: an address holds settings, no images.");
})();
