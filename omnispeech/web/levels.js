const FLOOR_DB = -54; // what counts as silence

/** Two levels, of the microphone and of the reply, as the CSS variable --level of elements. */
export class Levels {
  #shown = new Map();

  /** level: root mean square in [0, 1] */
  show(elements, level) {
    const decibels = 20 * Math.log10(Math.max(level, 1e-6));
    const part = Math.max(0, Math.min(1, 1 - decibels / FLOOR_DB));
    const calm = level === 0 ? 0 : 0.75 * (this.#shown.get(elements[0]) ?? 0);
    const shown = Math.max(part, calm); // up at once, down slowly
    this.#shown.set(elements[0], shown);
    for (const element of elements) element.style.setProperty("--level", shown.toFixed(3));
  }
}
