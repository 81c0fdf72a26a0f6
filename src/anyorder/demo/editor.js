/** An image, what of it is to be generated, and the tools to say so: brush, eraser, rectangle, border. */

import {$, Player, context, element} from "./player.js";

const MOST_PIXELS = 64e6, MOST_BYTES = 100e6, HISTORY = 50;
const checked = name => document.querySelector(`[name=${name}]:checked`).value;

export class Editor {
  image = null;    // a canvas of the image's own pixels, border included
  mask = null;     // 1 where a pixel is to be generated
  border = [0, 0, 0, 0];  // patches added on the left, top, right, bottom
  version = 0;
  past = [];
  cursor = null;
  corner = null;   // of a rectangle that the keyboard has begun

  /** `changed` is called after each change, `fail` with a sentence that says what is wrong. */
  constructor(about, changed, fail) {
    const factor = about.image[0] / about.grid[0];
    Object.assign(this, {about, changed, fail, factor});
    $("size").max = Math.max(...about.image) / 2;
    $("size").value = factor;
    $("undo").onclick = () => this.undo();
    $("invert").onclick = () => this.change(() => { this.mask = this.mask.map(value => 1 - value); });
    $("whole").onclick = () => this.change(() => this.mask.fill(1));
    $("nothing").onclick = () => this.change(() => this.mask.fill(0));
    $("size").oninput = () => this.paint();
    this.fields = [...document.querySelectorAll(".border input")];
    for (const input of this.fields) input.oninput = () => this.extend(+input.dataset.side, +input.value);
    this.listenToFiles();
    this.listenToPointer();
    for (const handle of document.querySelectorAll(".handle")) this.listenToHandle(handle);
    $("mask").onkeydown = event => this.key(event);
    $("mask").onblur = () => { this.cursor = this.corner = null; this.paint(); };
    new ResizeObserver(() => this.fit()).observe($("stage"));
    this.paint();
  }

  get empty() { return !this.image; }

  get painted() { return this.mask?.includes(1) ?? false; }

  get grid() { return [this.image.height / this.factor, this.image.width / this.factor]; }

  // --- images in, files out ---------------------------------------------------------------------------

  listenToFiles() {
    const stage = $("editor");
    $("file").onchange = () => { this.read($("file").files[0]); $("file").value = ""; };
    stage.ondragover = event => { event.preventDefault(); stage.classList.add("over"); };
    stage.ondragleave = () => stage.classList.remove("over");
    stage.ondrop = event => {
      event.preventDefault();
      stage.classList.remove("over");
      if (Player.dragged) this.load(Player.dragged());
      else this.read(event.dataTransfer.files[0]);
    };
    document.addEventListener("paste", event => { if (!$("editor").hidden && event.clipboardData.files[0]) this.read(event.clipboardData.files[0]); });
  }

  /** Read a file of the visitor's; it is scaled down here, and the server never sees more. */
  async read(file) {
    if (!file) return this.fail("That is no file: drop or choose an image.");
    if (file.size > MOST_BYTES) return this.fail(`${file.name} has ${Math.round(file.size / 1e6)} MB: choose an image below ${MOST_BYTES / 1e6} MB.`);
    const image = new Image(), address = URL.createObjectURL(file);
    try {
      image.src = address;
      await new Promise((done, failed) => Object.assign(image, {onload: done, onerror: failed}));
      const {naturalWidth: w, naturalHeight: h} = image;
      if (w * h > MOST_PIXELS) return this.fail(`${file.name} has ${Math.round(w * h / 1e6)} megapixels: choose an image below ${MOST_PIXELS / 1e6}.`);
      if (!w || !h) throw new Error("no size");
      this.load(image, w, h);
    } catch {
      this.fail(`${file.name} cannot be read as an image by this browser: choose a JPEG, PNG or WebP file.`);
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  /** Take an image of w x h pixels, scaled and cut at the middle to the size of the model's. */
  load(source, w = source.width, h = source.height) {
    const fits = w % this.factor === 0 && h % this.factor === 0 && w * h <= this.about.max_patches * this.factor ** 2
      && source instanceof HTMLCanvasElement;  // what was generated stays as it is
    const [high, wide] = fits ? [h, w] : this.about.image, scale = Math.max(wide / w, high / h);
    const image = element("canvas", {width: wide, height: high}), pen = image.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, wide, high);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(source, (wide - w * scale) / 2, (high - h * scale) / 2, w * scale, h * scale);
    if (!this.empty) this.remember();
    this.image = image;
    this.mask = new Uint8Array(wide * high);
    this.border = [0, 0, 0, 0];
    this.update();
    this.fit();
  }

  imageFile() { return base64(this.image); }

  maskFile() {
    const {width, height} = this.image, canvas = element("canvas", {width, height});
    canvas.getContext("2d").putImageData(this.layer([255, 255, 255, 255], [0, 0, 0, 255]), 0, 0);
    return base64(canvas);
  }

  /** The mask as pixels: one colour where something is generated, another where it is kept. */
  layer(inside, outside) {
    const data = new ImageData(this.image.width, this.image.height);
    this.mask.forEach((value, i) => data.data.set(value ? inside : outside, 4 * i));
    return data;
  }

  // --- changes ----------------------------------------------------------------------------------------

  /** Do something to the mask that can be undone. */
  change(action) {
    if (this.empty) return this.fail("Choose an image first.");
    this.remember();
    action();
    this.update();
  }

  remember() {
    this.past.push({image: this.image, mask: this.mask.slice(), border: [...this.border]});
    if (this.past.length > HISTORY) this.past.shift();
  }

  undo() {
    if (!this.past.length || this.painting) return;
    Object.assign(this, this.past.pop());
    this.update();
    this.fit();
  }

  update() {
    this.version++;
    this.fields.forEach((input, side) => { input.value = this.border[side]; });
    $("undo").disabled = !this.past.length;
    this.paint();
    this.changed();
  }

  /** Have `patches` patches of border on a side, to be generated. */
  extend(side, patches) {
    if (this.empty) return this.fail("Choose an image first.");
    const border = [...this.border], old = border[side], {width, height} = this.image;
    border[side] = Math.max(0, Math.round(patches) || 0);
    const more = (border[side] - old) * this.factor, [dx, dy] = [side === 0 ? more : 0, side === 1 ? more : 0];
    const wide = width + (side % 2 ? 0 : more), high = height + (side % 2 ? more : 0);
    if (!more) return;
    if (wide * high > this.about.max_patches * this.factor ** 2) {
      this.fields[side].value = old;
      return this.fail(`At most ${this.about.max_patches} patches: this border is too wide.`);
    }
    this.remember();
    const mask = new Uint8Array(wide * high).fill(1);
    for (let y = Math.max(0, -dy); y < Math.min(height, high - dy); y++)
      for (let x = Math.max(0, -dx); x < Math.min(width, wide - dx); x++) mask[(y + dy) * wide + x + dx] = this.mask[y * width + x];
    const image = element("canvas", {width: wide, height: high});
    image.getContext("2d").drawImage(this.image, dx, dy);
    Object.assign(this, {image, mask, border});
    this.update();
    if (!this.dragging) this.fit();
  }

  /** Brush or eraser from one point to another, in pixels of the image. */
  stroke([x0, y0], [x1, y1]) {
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)));
    for (let i = 0; i <= steps; i++) this.dab(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps);
    this.paint();
  }

  dab(cx, cy) {
    const {width, height} = this.image, radius = +$("size").value / 2, value = checked("tool") === "eraser" ? 0 : 1;
    const close = (x, y) => Math.hypot(x + .5 - cx, y + .5 - cy) <= Math.max(radius, .71);
    for (let y = Math.max(0, Math.floor(cy - radius - 1)); y < Math.min(height, cy + radius + 1); y++)
      for (let x = Math.max(0, Math.floor(cx - radius - 1)); x < Math.min(width, cx + radius + 1); x++)
        if (close(x, y)) this.mask[y * width + x] = value;
  }

  rectangle([x0, y0], [x1, y1]) {
    const {width, height} = this.image, clip = (x, most) => Math.min(Math.max(Math.round(x), 0), most);
    const [left, right] = [clip(Math.min(x0, x1), width), clip(Math.max(x0, x1), width)];
    for (let y = clip(Math.min(y0, y1), height); y < clip(Math.max(y0, y1), height); y++) this.mask.fill(1, y * width + left, y * width + right);
  }

  // --- pointer and keys -------------------------------------------------------------------------------

  at(event) {
    const box = $("mask").getBoundingClientRect();
    return [(event.clientX - box.left) / this.scale, (event.clientY - box.top) / this.scale];
  }

  listenToPointer() {
    const canvas = $("mask");
    let before = null, corner = null;
    canvas.onpointerdown = event => {
      if (event.button || !event.isPrimary || before) return;
      event.preventDefault();
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      this.painting = true;
      before = corner = this.at(event);
      canvas.onpointermove(event);
    };
    canvas.onpointermove = event => {
      if (!event.isPrimary) return;
      if (!event.buttons) canvas.onpointerup(event);  // where it was not told, as by a menu
      this.cursor = this.at(event);
      if (!before) return this.paint();
      if (checked("tool") !== "rectangle") this.stroke(before, this.cursor);
      else {
        this.mask = this.past.at(-1).mask.slice();
        this.rectangle(corner, this.cursor);
        this.paint();
      }
      before = this.cursor;
    };
    canvas.onpointerup = canvas.onpointercancel = event => {
      if (!before || !event.isPrimary) return;
      before = null;
      this.painting = false;
      this.update();
    };
    canvas.oncontextmenu = () => !before;  // a menu would swallow the end of the stroke
    canvas.onpointerleave = () => { if (!before) { this.cursor = null; this.paint(); } };
  }

  listenToHandle(handle) {
    const side = +handle.dataset.side, sign = side < 2 ? -1 : 1;
    handle.onpointerdown = event => {
      if (event.button || !event.isPrimary || this.dragging) return;
      event.preventDefault();
      handle.setPointerCapture(event.pointerId);
      this.dragging = {at: side % 2 ? event.clientY : event.clientX, patches: this.border[side]};
    };
    handle.onpointermove = event => {
      if (!this.dragging) return;
      if (!event.buttons) return handle.onpointerup();  // where it was not told, as by a menu
      const way = sign * ((side % 2 ? event.clientY : event.clientX) - this.dragging.at);
      this.extend(side, this.dragging.patches + Math.round(way / (this.scale * this.factor)));
    };
    handle.oncontextmenu = () => !this.dragging;
    handle.onpointerup = handle.onpointercancel = () => { this.dragging = null; this.fit(); };
  }

  key(event) {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}, {width, height} = this.image;
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key === " ") this.space(this.cursor ?? [width / 2, height / 2]);
    else if (moves[event.key]) {
      const [x, y] = this.cursor ?? [width / 2, height / 2], far = event.shiftKey ? this.factor : 1, [dx, dy] = moves[event.key];
      this.cursor = [Math.min(Math.max(x + dx * far, 0), width), Math.min(Math.max(y + dy * far, 0), height)];
    } else return;
    event.preventDefault();
    this.paint();
    const [x, y] = (this.cursor ?? [width / 2, height / 2]).map(Math.floor), share = this.mask.filter(value => value).length / this.mask.length;
    const open = this.corner ? "Move to the opposite corner and press Space. " : "";
    $("spoken").textContent = `${open}Column ${x}, row ${y}. ${Math.round(100 * share)} percent of the image is painted.`;
  }

  /** Brush and eraser dab where the cursor is; a rectangle takes two corners. */
  space(at) {
    const corner = this.corner;
    this.corner = checked("tool") === "rectangle" && !corner ? at : null;
    if (!this.corner) this.change(() => corner ? this.rectangle(corner, at) : this.dab(...at));
  }

  // --- on the screen ----------------------------------------------------------------------------------

  /** As large as there is room, in whole screen pixels per pixel where the image is small. */
  fit() {
    if (this.empty || this.dragging || !$("stage").clientWidth) return;
    const room = Math.min($("stage").clientWidth - 40, 480), scale = Math.min(room / this.image.width, 360 / this.image.height);
    this.scale = scale > 2 ? Math.floor(scale) : scale;
    this.paint();
  }

  paint() {
    $("empty").hidden = !this.empty;
    $("size-value").textContent = `${$("size").value} pixels`;
    $("frame").hidden = this.empty;
    if (this.empty || !this.scale) return;
    const canvas = $("mask"), {width, height} = this.image, w = width * this.scale, h = height * this.scale;
    canvas.style.width = `${w}px`;
    const pen = context(canvas, w, h);
    pen.imageSmoothingEnabled = width > 64;
    pen.drawImage(this.image, 0, 0, w, h);
    this.paintMask(pen, w, h);
    if (!this.cursor) return;
    for (const [line, style] of [[3, "#fff"], [1.5, "#111"]]) {
      pen.lineWidth = line;
      pen.strokeStyle = style;
      pen.beginPath();
      pen.arc(this.cursor[0] * this.scale, this.cursor[1] * this.scale, Math.max(3, +$("size").value / 2 * this.scale), 0, 7);
      pen.stroke();
    }
  }

  /** Stripes over what is to be generated. */
  paintMask(pen, w, h) {
    const shape = element("canvas", {width: this.image.width, height: this.image.height});
    shape.getContext("2d").putImageData(this.layer([0, 0, 0, 255], [0, 0, 0, 0]), 0, 0);
    const stripes = element("canvas", {width: w, height: h}), brush = stripes.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(shape, 0, 0, w, h);
    brush.globalCompositeOperation = "source-in";
    brush.fillStyle = "#5b3fd6";
    brush.fillRect(0, 0, w, h);
    brush.globalCompositeOperation = "source-atop";
    brush.strokeStyle = "#8f7bea";
    brush.lineWidth = 3;
    brush.beginPath();
    for (let x = -h; x < w; x += 12) {
      brush.moveTo(x, h);
      brush.lineTo(x + h, 0);
    }
    brush.stroke();
    pen.globalAlpha = .78;
    pen.drawImage(stripes, 0, 0, w, h);
    pen.globalAlpha = 1;
  }
}

const base64 = canvas => canvas.toDataURL("image/png").split(",")[1];
