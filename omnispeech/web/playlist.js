import { Track } from "./track.js";

const REPORT_EVERY = 1024; // samples: 43 ms

/**
 * Plays tracks one after the other and tells how far it is.
 *
 * port: what is to be played comes through it, and the reports go out.
 */
export class Playlist {
  #port;
  #tracks = [];
  #dying = []; // cut; they still sound for one call, fading
  #sinceReport = 0;
  #energy = 0;

  constructor(port) {
    this.#port = port;
    this.#port.onmessage = ({ data }) => this[data.type](data);
  }

  push({ item, floats }) {
    this.#track(item).push(floats);
  }

  end({ item }) {
    const track = this.#tracks.find((one) => one.item === item);
    if (track) track.ended = true;
  }

  stop() {
    const cut = this.#tracks.map(({ item, played }) => ({ item, played }));
    this.#dying = this.#tracks.splice(0);
    this.#port.postMessage({ type: "stopped", cut });
  }

  /** out: silence, to be filled */
  fill(out) {
    if (this.#dying.length) this.#fade(out);
    else if (this.#tracks.length) this.#play(out);
  }

  #track(item) {
    const last = this.#tracks.at(-1);
    if (last?.item === item) return last;
    if (last) last.ended = true;
    this.#tracks.push(new Track(item));
    return this.#tracks.at(-1);
  }

  #play(out) {
    this.#read(out);
    this.#measure(out);
  }

  #read(out) {
    let filled = 0;
    while (filled < out.length && this.#tracks.length) {
      const track = this.#tracks[0];
      filled += track.read(out, filled);
      if (!track.finished) return;
      this.#tracks.shift();
      this.#report(track, true);
    }
  }

  // A sound cut in the middle of a wave clicks: it fades within this call (of 128 samples: 5 ms).
  #fade(out) {
    this.#dying[0].read(out, 0);
    for (let i = 0; i < out.length; i += 1) out[i] *= 1 - i / out.length;
    this.#dying = [];
  }

  #measure(out) {
    for (const value of out) this.#energy += value * value;
    this.#sinceReport += out.length;
    if (this.#sinceReport >= REPORT_EVERY && this.#tracks.length) this.#report(this.#tracks[0]);
  }

  #report({ item, played, gaps, missing }, finished = false) {
    const level = Math.sqrt(this.#energy / Math.max(1, this.#sinceReport));
    const left = this.#tracks.length;
    const figures = { item, played, gaps, missing, level, finished, left };
    this.#port.postMessage({ type: "report", ...figures });
    this.#sinceReport = 0;
    this.#energy = 0;
  }
}
