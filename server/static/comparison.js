/** Two pictures in one place, a divider between them, and a view that zooms and moves: before on the left. */

import { make } from "./elements.js";

const MAX_SCREEN_PX = 16; // screen pixels per pixel of the result, at most
const PIXELS_FROM = 7.99; // screen pixels per pixel from which on single pixels are shown as squares
const WHEEL_SPEED = 0.0018;
const KEY_ZOOM = 1.5;
const KEY_MOVE_PX = 60;

export class Comparison {
  /** In `root`, which has a size of its own; `onView` is told of every change of scale. */
  constructor(root, onView) {
    this.#root = root;
    this.#invitation = [...root.children];
    this.#onView = onView;
    this.#split = make("input", {
      type: "range", min: 0, max: 100, step: 0.5, value: 50, class: "split", "aria-label": "Divider between before and after",
      on: { input: () => this.#paint() },
    });
    this.#before = make("div", { class: "layer before" });
    this.#after = make("div", { class: "layer after" });
    this.#view = make("div", { class: "view", tabIndex: 0, role: "img", "aria-label": "The picture; keys zoom and move it" }, this.#after, this.#before);
    this.#parts = [
      this.#view, this.#split, make("div", { class: "handle", "aria-hidden": "true" }),
      make("span", { class: "tag left" }, "Before"), make("span", { class: "tag right" }, "After"),
    ];
    this.#listen();
    new ResizeObserver(() => this.#paint()).observe(root);
  }

  #root; #onView; #split; #before; #after; #view; #parts; #invitation;
  #size = null; // of the largest picture, px
  #zoom = 1; // 1 shows all of it
  #x = 0;
  #y = 0;
  #turn = 0;
  #pointers = new Map();
  #drag = "";

  /** Show a picture alone (`after` null), two of them, or a result alone (`before` null); URLs, and what `after` is. */
  async show(before, after, name = "After") {
    const turn = ++this.#turn;
    const images = await Promise.all([before, after].map((url) => (url ? loaded(url) : null)));
    if (turn !== this.#turn) return this.#size; // something newer is shown, or on its way
    const [first, second] = images;
    const largest = second ?? first;
    const isSameShape = this.#size && largest && Math.abs(this.#size.width / this.#size.height - largest.naturalWidth / largest.naturalHeight) < 0.02;
    this.#size = largest ? { width: largest.naturalWidth, height: largest.naturalHeight } : null;
    this.#parts.at(-1).textContent = name;
    this.#before.replaceChildren(...(first ? [first] : []));
    this.#after.replaceChildren(...(second ? [second] : []));
    this.#root.dataset.state = first && second ? "pair" : largest ? "single" : "empty";
    this.#root.replaceChildren(...(largest ? this.#parts : this.#invitation));
    if (!isSameShape) this.fit();
    this.#paint();
    return this.#size;
  }

  /** Say something in place of a picture. */
  say(message) {
    this.#size = null;
    this.#root.dataset.state = "note";
    this.#root.replaceChildren(make("p", { class: "note" }, message));
  }

  fit() {
    [this.#zoom, this.#x, this.#y] = [1, 0, 0];
    this.#paint();
  }

  /** One pixel of the picture per pixel of the screen. */
  full() {
    this.zoomTo(1 / (this.#fitted().scale * devicePixelRatio));
  }

  zoomBy(factor, at) {
    this.zoomTo(this.#zoom * factor, at);
  }

  /** Zoom so that the point `at` (px from the middle of the view) stays where it is. */
  zoomTo(zoom, at = { x: 0, y: 0 }) {
    if (!this.#size) return;
    const fullest = MAX_SCREEN_PX / (this.#fitted().scale * devicePixelRatio);
    const next = Math.min(Math.max(1, fullest), Math.max(Math.min(1, 1 / (this.#fitted().scale * devicePixelRatio)), zoom));
    const factor = next / this.#zoom;
    this.#x = at.x - (at.x - this.#x) * factor;
    this.#y = at.y - (at.y - this.#y) * factor;
    this.#zoom = next;
    this.#paint();
  }

  moveBy(x, y) {
    this.#x += x;
    this.#y += y;
    this.#paint();
  }

  /** What the picture measures when all of it is shown, in CSS px. */
  #fitted() {
    const { clientWidth: width, clientHeight: height } = this.#root;
    if (!this.#size) return { width, height, scale: 1 };
    // Small pictures are not blown up beyond the view's own measure of sharpness: three times at most.
    const scale = Math.min(width / this.#size.width, height / this.#size.height, 3);
    return { width: this.#size.width * scale, height: this.#size.height * scale, scale };
  }

  #paint() {
    if (!this.#size) return;
    const { clientWidth, clientHeight } = this.#root;
    const fitted = this.#fitted();
    const width = fitted.width * this.#zoom;
    const height = fitted.height * this.#zoom;
    const slack = (size, room) => Math.max(0, (size - room) / 2);
    this.#x = Math.min(slack(width, clientWidth), Math.max(-slack(width, clientWidth), this.#x));
    this.#y = Math.min(slack(height, clientHeight), Math.max(-slack(height, clientHeight), this.#y));
    const left = (clientWidth - width) / 2 + this.#x;
    const top = (clientHeight - height) / 2 + this.#y;
    // The divider runs over the part of the picture that is seen.
    const [from, to] = [Math.max(0, left), Math.min(clientWidth, left + width)];
    const at = from + ((to - from) * this.#split.value) / 100;
    const place = { left, top, width, height, at };
    for (const [name, value] of Object.entries(place)) this.#root.style.setProperty(`--${name}`, `${value}px`);
    this.#root.dataset.zoomed = String(width > clientWidth + 1 || height > clientHeight + 1);
    this.#root.dataset.pixels = String(fitted.scale * this.#zoom * devicePixelRatio >= PIXELS_FROM);
    this.#split.setAttribute("aria-valuetext", `${Math.round(this.#split.value)} percent before`);
    this.#onView(fitted.scale * this.#zoom * devicePixelRatio);
  }

  #listen() {
    const root = this.#root;
    root.addEventListener("pointerdown", (event) => this.#down(event));
    root.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) root.addEventListener(end, (event) => this.#pointers.delete(event.pointerId));
    root.addEventListener("wheel", (event) => {
      if (!this.#size || (!event.ctrlKey && !event.metaKey && root.dataset.zoomed !== "true" && event.deltaY > 0)) return;
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * WHEEL_SPEED), this.#fromMiddle(event));
    }, { passive: false });
    root.addEventListener("dblclick", (event) => {
      if (!this.#size) return;
      if (this.#zoom > 1.01) this.fit();
      else this.zoomTo(Math.max(2, 1 / (this.#fitted().scale * devicePixelRatio)), this.#fromMiddle(event));
    });
    this.#view.addEventListener("keydown", (event) => this.#key(event));
  }

  #down(event) {
    if (!this.#size || event.button > 0) return;
    this.#pointers.set(event.pointerId, event);
    this.#root.setPointerCapture(event.pointerId);
    const { left } = this.#root.getBoundingClientRect();
    const at = Number.parseFloat(this.#root.style.getPropertyValue("--at"));
    const isNear = Math.abs(event.clientX - left - at) < 28;
    const isPair = this.#root.dataset.state === "pair";
    this.#drag = isPair && (isNear || this.#root.dataset.zoomed !== "true") ? "split" : "move";
    if (this.#drag === "split" && !isNear) this.#splitTo(event);
  }

  #move(event) {
    const last = this.#pointers.get(event.pointerId);
    if (!last) return;
    if (this.#pointers.size === 2) this.#pinch(event);
    else if (this.#drag === "split") this.#splitTo(event);
    else this.moveBy(event.clientX - last.clientX, event.clientY - last.clientY);
    this.#pointers.set(event.pointerId, event);
  }

  #pinch(event) {
    const other = [...this.#pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    const last = this.#pointers.get(event.pointerId);
    const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
    this.zoomBy(distance(event) / Math.max(1, distance(last)), this.#fromMiddle(middle));
    this.moveBy((event.clientX - last.clientX) / 2, (event.clientY - last.clientY) / 2);
  }

  #splitTo(event) {
    const box = this.#root.getBoundingClientRect();
    const left = Math.max(0, Number.parseFloat(this.#root.style.getPropertyValue("--left")));
    const right = Math.min(box.width, left + Number.parseFloat(this.#root.style.getPropertyValue("--width")));
    this.#split.value = (100 * (event.clientX - box.left - left)) / (right - left);
    this.#paint();
  }

  #key(event) {
    const actions = {
      "+": () => this.zoomBy(KEY_ZOOM), "=": () => this.zoomBy(KEY_ZOOM), "-": () => this.zoomBy(1 / KEY_ZOOM),
      0: () => this.fit(), 1: () => this.full(),
      ArrowLeft: () => this.moveBy(KEY_MOVE_PX, 0), ArrowRight: () => this.moveBy(-KEY_MOVE_PX, 0),
      ArrowUp: () => this.moveBy(0, KEY_MOVE_PX), ArrowDown: () => this.moveBy(0, -KEY_MOVE_PX),
    };
    const action = event.ctrlKey || event.metaKey || event.altKey ? null : actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #fromMiddle(event) {
    const box = this.#root.getBoundingClientRect();
    return { x: event.clientX - box.left - box.width / 2, y: event.clientY - box.top - box.height / 2 };
  }
}

/** An image that has been read; null if this browser cannot. */
async function loaded(url) {
  const image = make("img", { src: url, alt: "", draggable: false, crossOrigin: url.startsWith("http") ? "anonymous" : null });
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  }
}
