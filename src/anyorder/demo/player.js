/** Shows runs: the images of each order as they grow, their order maps, and the chart. */

import {shareRun} from "./share.js";

export const $ = id => document.getElementById(id);
export const title = name => name.replaceAll("_", " ");

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// viridis backwards, as in the figures of the reports: light is first, dark is last
const MAP = ["#fde725", "#addc30", "#5ec962", "#28ae80", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154"]
  .map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
const KINDS = {inferred: "inferred by the model", given: "given beforehand"};
const PEEKS = "Looks at each sampled token before it chooses the position: its log-probability does not compare with others.";
const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const LARGEST = 240;  // screen pixels of a side of an image
const RECENT = 8;  // arrows that are drawn boldly while the order is replayed
const number = (x, digits) => x.toFixed(digits).replace("-", "−");

export class Player {
  runs = [];
  head = 0;
  playing = true;
  last = 0;
  painted = "";

  /** `edit` is called with the canvas of an image that someone chooses. */
  constructor(about, edit) {
    Object.assign(this, {about, edit});
    $("play").onclick = () => this.toggle();
    $("head").oninput = () => { this.playing = false; this.head = Math.min(+$("head").value, this.ready); };
    $("key").style.background = `linear-gradient(90deg, ${MAP.map(rgb => `rgb(${rgb})`)})`;
    requestAnimationFrame(now => this.animate(now));
  }

  toggle() {
    this.playing = !this.playing;
    if (!this.playing || this.head < this.total) return;
    this.head = 0;
    if ($("speed").value === "Infinity") $("speed").value = "16";
  }

  /** Patches that are there in every run. */
  get ready() { return Math.min(...this.runs.map(run => run.done)); }

  get total() { return this.runs[0]?.total ?? 1; }

  begin(orders, n, grid) {
    const size = grid[0] * grid[1];
    Object.assign(this, {grid, head: 0, playing: true, painted: ""});
    this.runs = orders.map((name, i) => ({
      name, n, grid, colour: `--c${i}`, total: size, done: 0, seconds: 0, frames: [], points: [[0, 0]],
      order: this.about.orders.find(order => order.name === name),
      rank: Array.from({length: n}, () => new Array(size).fill(Infinity)), made: new Array(n).fill(0),
    }));
    for (const run of this.runs) run.panel = this.panel(run);
    $("panels").replaceChildren(...this.runs.map(run => run.panel.root));
    $("names").replaceChildren(...this.runs.map(run => owned(element("span", {textContent: title(run.name)}), run.colour)));
    for (const id of ["figure", "player"]) $(id).hidden = false;
  }

  /** A step of the server. */
  take(step) {
    const run = this.runs[step.order];
    step.positions.forEach((row, i) => row.forEach(position => { run.rank[i][position] = run.made[i]++; }));
    const mean = step.log_prob.flat().reduce((sum, x) => sum + x, 0) / run.n;
    run.points.push([step.done, run.points.at(-1)[1] + mean]);
    Object.assign(run, {done: step.done, total: step.total, seconds: step.seconds});
    if (!step.png) return;
    const image = new Image();
    image.src = `data:image/png;base64,${step.png}`;
    run.frames.push({done: step.done, image, png: step.png});
    if (step.done === step.total) image.onload = run.finished;
  }

  panel(run) {
    const facts = [element("dd"), element("dd"), element("dd")];
    const names = ["nats, log-probability", "nats per patch", "seconds per image"];
    const list = element("dl", {}, ...facts.flatMap((dd, j) => [element("div", {}, element("dt", {textContent: names[j]}), dd)]));
    const heading = element("h2", {}, title(run.name), element("small", {textContent: KINDS[run.order.kind]}));
    if (!run.order.good) heading.append(element("small", {className: "tag", textContent: "experiment", title: run.order.why}));
    const tiles = Array.from({length: run.n}, (_, i) => this.tile(run, i));
    const note = run.order.token_blind ? [] : [element("p", {className: "note", textContent: PEEKS})];
    const root = owned(element("section", {className: "card panel"}, heading,
      element("div", {className: "tiles"}, ...tiles), list, ...note, shareRun(run)), run.colour);
    root.setAttribute("aria-label", title(run.name));
    return {root, tiles, facts};
  }

  /** One image, which can be chosen or dragged into the editor. */
  tile(run, i) {
    const canvas = element("canvas", {className: "tile", tabIndex: 0, draggable: true, title: "Edit: click, or drag into the editor"});
    canvas.setAttribute("role", "button");
    canvas.setAttribute("aria-label", `Image ${i + 1} in the order ${title(run.name)}: edit it`);
    const choose = () => { if (run.frames.length) this.edit(this.picture(run, i)); };
    canvas.onclick = choose;
    canvas.onkeydown = event => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); choose(); } };
    canvas.ondragstart = event => {
      event.dataTransfer.setData("text/plain", canvas.title);
      Player.dragged = () => this.picture(run, i);
    };
    canvas.ondragend = () => { Player.dragged = null; };
    return canvas;
  }

  /** The latest state of one image as a canvas of its own pixels. */
  picture(run, i) {
    const {image} = run.frames.at(-1), w = image.naturalWidth / run.n, h = image.naturalHeight;
    const canvas = element("canvas", {width: w, height: h}), pen = canvas.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, w, h);
    pen.drawImage(image, -i * w, 0);
    return canvas;
  }

  animate(now) {
    const speed = still.matches ? Infinity : +$("speed").value, most = this.runs.length ? this.ready : 0;
    if (this.playing) this.head = speed === Infinity ? most : Math.min(most, this.head + speed * (now - this.last) / 1000);
    if (this.playing && this.head >= this.total) this.playing = false;
    this.last = now;
    if (this.runs.length) this.paint(Math.floor(this.head));
    requestAnimationFrame(later => this.animate(later));
  }

  /** Everything, if anything has changed. */
  paint(shown) {
    for (const run of this.runs) run.frame = run.frames.findLast(frame => frame.done <= shown && frame.image.complete);
    const view = JSON.stringify([shown, this.playing, this.total, this.runs.map(run => [run.done, run.frame?.done]),
      $("show").value, $("numbers").checked, $("arrows").checked, $("panels").clientWidth, innerHeight, devicePixelRatio, dark.matches]);
    if (view === this.painted) return;
    this.painted = view;
    const fitting = Math.max(1, Math.floor($("panels").clientWidth / 300)), lines = Math.ceil(this.runs.length / fitting);
    $("panels").style.setProperty("--columns", Math.ceil(this.runs.length / lines));
    $("head").max = this.total;
    $("head").value = shown;
    $("count").textContent = `${shown} / ${this.total}`;
    $("play").textContent = this.playing ? "Pause" : shown >= this.total ? "Replay" : "Play";
    for (const run of this.runs) paintRun(run, shown);
    paintChart(this.runs, shown, this.total);
  }
}

function owned(made, colour) {
  made.style.setProperty("--own", `var(${colour})`);
  return made;
}

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (MAP.length - 1), i = Math.min(Math.floor(at), MAP.length - 2);
  return MAP[i].map((x, j) => Math.round(x + (at - i) * (MAP[i + 1][j] - x)));
}

/** A 2-D context in CSS pixels, cleared, sharp on every screen. */
export function context(canvas, width, height) {
  const ratio = devicePixelRatio;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

function paintRun(run, shown) {
  const {root, tiles, facts} = run.panel, mode = $("show").value, both = mode === "both" ? 2 : 1;
  root.style.setProperty("--tiles", columnsOf(run, both, tiles[0].parentElement.clientWidth));
  tiles.forEach((canvas, i) => paintTile(canvas, run, i, shown, mode, both));
  const [revealed, nats] = run.points.findLast(point => point[0] <= shown);
  facts[0].textContent = number(nats, 1);
  facts[1].textContent = revealed ? number(nats / revealed, 2) : "–";
  facts[2].textContent = run.done ? number(run.seconds / run.n, 2) : "–";
}

/** Columns of tiles: the images are as large as they can be and still be seen all at once. */
function columnsOf(run, both, width) {
  const room = .56 * innerHeight, [rows, columns] = run.grid;
  for (let wide = 1; wide < run.n; wide++) {
    const high = Math.min(width / wide, both * LARGEST) / both * rows / columns;
    if (Math.ceil(run.n / wide) * high < room || width / (wide + 1) < 70 * both) return wide;
  }
  return run.n;
}

function paintTile(canvas, run, i, shown, mode, both) {
  const [rows, columns] = run.grid, gap = 3, w = (canvas.clientWidth - (both - 1) * gap) / both, h = w * rows / columns;
  const pen = context(canvas, canvas.clientWidth, h), style = getComputedStyle(document.documentElement);
  for (let square = 0; square < both; square++) {
    const map = both === 2 ? square === 1 : mode !== "picture", alone = map && mode !== "over";
    pen.save();
    pen.translate(square * (w + gap), 0);
    pen.beginPath();
    pen.roundRect(0, 0, w, h, 5);
    pen.clip();
    pen.fillStyle = style.getPropertyValue("--blank");
    pen.fillRect(0, 0, w, h);
    if (run.frame && !alone) paintImage(pen, run.frame.image, run.n, i, w, h);
    if (map) paintOrder(pen, run, i, shown, w, h, alone ? 1 : .5);
    else paintNewest(pen, run, i, shown, w, h);
    pen.restore();
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.beginPath();
    pen.roundRect(square * (w + gap) + .5, .5, w - 1, h - 1, 5);
    pen.stroke();
  }
}

function paintImage(pen, image, n, i, w, h) {
  const wide = image.naturalWidth / n;
  pen.imageSmoothingEnabled = wide > 64;
  pen.drawImage(image, i * wide, 0, wide, image.naturalHeight, 0, 0, w, h);
}

/** The heat map, and if asked for numbers and arrows. */
function paintOrder(pen, run, i, shown, w, h, opacity) {
  const [rows, columns] = run.grid, cw = w / columns, ch = h / rows;
  run.rank[i].forEach((step, position) => {
    if (step >= shown) return;
    const x = Math.round(position % columns * cw), y = Math.round(Math.floor(position / columns) * ch);
    pen.globalAlpha = opacity;
    pen.fillStyle = `rgb(${colour(step / Math.max(1, run.total - 1))})`;
    // whole pixels, or translucent patches show seams
    pen.fillRect(x, y, Math.round((position % columns + 1) * cw) - x, Math.round((Math.floor(position / columns) + 1) * ch) - y);
  });
  pen.globalAlpha = 1;
  if ($("arrows").checked) paintArrows(pen, run, i, shown, cw, ch);
  paintNewest(pen, run, i, shown, w, h);
  if ($("numbers").checked) paintNumbers(pen, run, i, shown, cw, ch);
}

function paintNumbers(pen, run, i, shown, cw, ch) {
  const columns = run.grid[1];
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `600 ${Math.min(cw, ch) * .42}px system-ui, sans-serif`;
  run.rank[i].forEach((step, position) => {
    if (step >= shown) return;
    const rgb = colour(step / Math.max(1, run.total - 1));
    pen.fillStyle = .3 * rgb[0] + .6 * rgb[1] + .1 * rgb[2] > 115 ? "#111" : "#fff";
    pen.fillText(step + 1, (position % columns + .5) * cw, (Math.floor(position / columns) + .5) * ch);
  });
}

/** The way from each patch to the next. */
function paintArrows(pen, run, i, shown, cw, ch) {
  const columns = run.grid[1], at = [];
  run.rank[i].forEach((step, position) => { if (step < shown) at[step] = [(position % columns + .5) * cw, (Math.floor(position / columns) + .5) * ch]; });
  const size = Math.min(cw, ch) * .22;
  for (const [width, style] of [[3, "#fff"], [1.2, "#111"]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    for (let k = 1; k < at.length; k++) {
      const [x, y] = at[k], [x0, y0] = at[k - 1], way = Math.atan2(y - y0, x - x0);
      pen.globalAlpha = k > at.length - RECENT || shown >= run.total ? 1 : .3;
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.lineTo(x, y);
      for (const turn of [2.6, -2.6]) {
        pen.moveTo(x, y);
        pen.lineTo(x + size * Math.cos(way + turn), y + size * Math.sin(way + turn));
      }
      pen.stroke();
    }
  }
  pen.globalAlpha = 1;
}

/** A frame around the patch revealed last. */
function paintNewest(pen, run, i, shown, w, h) {
  const [rows, columns] = run.grid, cw = w / columns, ch = h / rows, position = run.rank[i].indexOf(shown - 1);
  if (shown >= run.total || position < 0) return;
  for (const [width, style] of [[4, "#111"], [2, "#fff"]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.strokeRect(position % columns * cw + 1, Math.floor(position / columns) * ch + 1, cw - 2, ch - 2);
  }
}

function paintChart(runs, shown, total) {
  const canvas = $("chart"), width = canvas.clientWidth, height = canvas.clientHeight;
  const pen = context(canvas, width, height), style = getComputedStyle(document.documentElement);
  const left = 52, right = 12, top = 8, bottom = 26, nats = runs.flatMap(run => run.points.map(point => point[1]));
  const lowest = Math.min(-1, ...nats), highest = Math.max(...nats);
  const x = done => left + done / total * (width - left - right);
  const y = value => top + (highest - value) / (highest - lowest) * (height - top - bottom);
  pen.font = "12px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.fillStyle = style.getPropertyValue("--muted");
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = tick(highest - lowest);
  for (let value = Math.ceil(lowest / every) * every; value <= highest; value += every) {
    pen.fillText(Math.abs(value) < every / 2 ? "0" : number(value, every < 1 ? 1 : 0), left - 8, y(value));
    pen.beginPath();
    pen.moveTo(left, y(value));
    pen.lineTo(width - right, y(value));
    pen.stroke();
  }
  pen.textBaseline = "bottom";
  for (const share of width < 420 ? [0, .5, 1] : [0, .25, .5, .75, 1]) {
    pen.textAlign = share === 1 ? "right" : share ? "center" : "left";
    pen.fillText(`${Math.round(share * total)}${share === 1 ? " patches" : ""}`, x(share * total), height - 4);
  }
  pen.lineWidth = 2.2;
  pen.lineJoin = "round";
  for (const run of runs) {
    pen.strokeStyle = style.getPropertyValue(run.colour);
    pen.setLineDash(run.order.token_blind ? [] : [3, 5]);
    pen.beginPath();
    for (const [done, value] of run.points) if (done <= shown) pen.lineTo(x(done), y(value));
    pen.stroke();
  }
}

/** A round distance between grid lines, so that there are about five. */
function tick(range) {
  const raw = range / 5, power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find(m => m * power >= raw) * power;
}
