import { Source } from "./source.js";

const TAP_MS = 300; // a shorter press stays down until the next one: nobody has to hold a button
const WRITING = "input, textarea, select, button, summary, a, audio";

/**
 * The talk button and the keys. Tells "press" and "release" of the talk button (Space does the
 * same), and "escape".
 */
export class Controls extends Source {
  #button;
  #pressedAt = null;
  #latched = false;

  constructor(button) {
    super();
    this.#button = button;
    button.addEventListener("pointerdown", (event) => this.#pointerDown(event));
    button.addEventListener("pointerup", () => this.#up());
    button.addEventListener("pointercancel", () => this.#up());
    button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long touch
    button.addEventListener("click", (event) => this.#click(event));
    document.addEventListener("keydown", (event) => this.#keyDown(event));
    document.addEventListener("keyup", (event) => this.#keyUp(event));
    window.addEventListener("blur", () => this.#up());
  }

  /** The button is up again, whatever was pressed. */
  reset() {
    this.#pressedAt = null;
    this.#latched = false;
  }

  #pointerDown(event) {
    if (event.button !== 0) return;
    this.#button.setPointerCapture(event.pointerId);
    this.#down();
  }

  // Screen readers click without a pointer and without a key.
  #click(event) {
    if (event.detail !== 0 || this.#pressedAt !== null) return;
    this.#down();
    this.#up();
  }

  #keyDown(event) {
    if (event.key === "Escape") this.emit("escape");
    if (!this.#isTalkKey(event)) return;
    event.preventDefault(); // Space scrolls
    if (!event.repeat) this.#down();
  }

  #keyUp(event) {
    if (!this.#isTalkKey(event)) return;
    event.preventDefault(); // or the button is clicked as well
    this.#up();
  }

  #isTalkKey({ key, target }) {
    if (target === this.#button) return key === " " || key === "Enter";
    return key === " " && !target.closest?.(WRITING);
  }

  #down() {
    if (this.#latched) return this.#release();
    if (this.#pressedAt !== null) return;
    this.#pressedAt = performance.now();
    this.emit("press");
  }

  #up() {
    if (this.#pressedAt === null || this.#latched) return;
    if (performance.now() - this.#pressedAt < TAP_MS) this.#latched = true;
    else this.#release();
  }

  #release() {
    this.reset();
    this.emit("release");
  }
}
