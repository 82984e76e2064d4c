import { Source } from "./source.js";

const KEPT = 20; // turns

/** When things happened in one turn, on the clock of performance.now(), and what that tells. */
export class Timing {
  endOfSpeech = null; // null: nothing was spoken: a file, or typed
  asked = null; // the server has the whole question
  firstText = null;
  firstSound = null;
  done = null;
  soundMs = 0; // of the reply, as it came
  gaps = 0; // times the sound ran out while it was played
  gapMs = 0;

  get endpointingMs() {
    return this.endOfSpeech === null ? null : Math.max(0, this.asked - this.endOfSpeech);
  }

  get firstTextMs() {
    return this.#sinceAsked(this.firstText);
  }

  get firstSoundMs() {
    return this.#sinceAsked(this.firstSound);
  }

  /** Seconds from the whole question to the end of the reply per second of its sound. */
  get realTimeFactor() {
    if (this.done === null || !this.soundMs) return null;
    return (this.done - this.asked) / this.soundMs;
  }

  #sinceAsked(moment) {
    return moment === null ? null : Math.max(0, moment - this.asked);
  }
}

/** The last turns. Tells "changed". */
export class Timings extends Source {
  turns = [];

  begin(endOfSpeech = null) {
    const timing = new Timing();
    timing.endOfSpeech = endOfSpeech;
    timing.asked = performance.now();
    this.turns = [...this.turns, timing].slice(-KEPT);
    this.emit("changed");
    return timing;
  }

  /** Notes the moment under `name` unless it was noted before. */
  mark(timing, name) {
    if (timing[name] !== null) return;
    timing[name] = performance.now();
    this.emit("changed");
  }

  note(timing, figures) {
    Object.assign(timing, figures);
    this.emit("changed");
  }
}
