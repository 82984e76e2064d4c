/** Any rate -> 24 kHz, continuous across pieces: where a browser cannot do it by itself. */

const HALF = 16; // taps on each side, at the lower of the two rates

export class Resampler {
  #step; // input samples per output sample
  #reach; // input samples that an output sample looks at on each side
  #held;
  #next; // where in #held the next output sample lies

  constructor(fromHz, toHz) {
    this.#step = fromHz / toHz;
    this.#reach = Math.ceil(HALF * Math.max(1, this.#step));
    this.#held = new Float32Array(this.#reach); // silence before the sound
    this.#next = this.#reach;
  }

  push(piece) {
    const held = new Float32Array(this.#held.length + piece.length);
    held.set(this.#held);
    held.set(piece, this.#held.length);
    const out = [];
    while (this.#next + this.#reach < held.length) {
      out.push(this.#at(held, this.#next));
      this.#next += this.#step;
    }
    const past = Math.max(0, Math.floor(this.#next) - this.#reach);
    this.#held = held.slice(past);
    this.#next -= past;
    return Float32Array.from(out);
  }

  // A sinc under a Hann window, its cut-off at 95 % of the lower half rate.
  #at(held, place) {
    const cutoff = 0.95 / Math.max(1, this.#step);
    let sum = 0;
    for (let i = Math.ceil(place - this.#reach); i <= place + this.#reach; i += 1) {
      const x = i - place;
      const sinc = x === 0 ? 1 : Math.sin(Math.PI * cutoff * x) / (Math.PI * cutoff * x);
      const hann = 0.5 + 0.5 * Math.cos((Math.PI * x) / (this.#reach + 1));
      sum += held[i] * cutoff * sinc * hann;
    }
    return sum;
  }
}
