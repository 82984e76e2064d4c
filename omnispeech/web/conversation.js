import { RATE_HZ, joined, milliseconds, wavFile } from "./pcm.js";
import { Source } from "./source.js";

const PAUSE = new Int16Array(0.4 * RATE_HZ); // between turns in the sound file
const NAMES = { user: "You", assistant: "omnispeech", note: "Note" };

/**
 * What was said, in order. Tells "added" and "changed" with the entry:
 * {id, role, text, pieces, state, heardMs, heardText, at}.
 *
 * role: "user", "assistant" or "note". state: "open", "whole", "limited", "cut" or "failed".
 * heardMs, heardText: how much of a reply was played; null: all of it.
 */
export class Conversation extends Source {
  entries = [];

  add(id, role, text = "") {
    const known = this.find(id);
    if (known) return known;
    const entry = { id, role, text, pieces: [], state: "open", at: new Date() };
    Object.assign(entry, { heardMs: null, heardText: null });
    this.entries.push(entry);
    this.emit("added", entry);
    return entry;
  }

  note(text) {
    this.change(this.add(`note-${this.entries.length}`, "note", text), { state: "whole" });
  }

  find(id) {
    return this.entries.find((entry) => entry.id === id);
  }

  change(entry, fields) {
    Object.assign(entry, fields);
    this.emit("changed", entry);
  }

  remove(entry) {
    this.entries.splice(this.entries.indexOf(entry), 1);
    this.emit("removed", entry);
  }

  asText() {
    return this.entries.map((entry) => `${stamp(entry.at)} ${line(entry)}\n`).join("");
  }

  /** Stereo: on the left what was asked, on the right what was heard; pauses are shortened. */
  asWav() {
    const [left, right] = [[], []];
    for (const entry of this.entries.filter(({ pieces }) => pieces.length)) {
      const sound = heard(entry);
      const silence = new Int16Array(sound.length);
      left.push(entry.role === "user" ? sound : silence, PAUSE);
      right.push(entry.role === "user" ? silence : sound, PAUSE);
    }
    return wavFile(joined(left), joined(right));
  }
}

export const durationMs = ({ pieces }) =>
  milliseconds(pieces.reduce((length, piece) => length + piece.length, 0));

export function heard(entry) {
  const whole = joined(entry.pieces);
  if (entry.heardMs === null) return whole;
  return whole.subarray(0, Math.round((entry.heardMs * RATE_HZ) / 1000));
}

function line(entry) {
  const seconds = (durationMs(entry) / 1000).toFixed(1);
  const cut = entry.heardMs === null ? "" : ` [cut after ${(entry.heardMs / 1000).toFixed(1)} s]`;
  const text = (entry.heardText ?? entry.text).trim();
  return `${NAMES[entry.role]}: ${text || `[${seconds} s of sound]`}${cut}`;
}

const stamp = (at) => at.toTimeString().slice(0, 8);
