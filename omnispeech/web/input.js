import { joined, milliseconds, RATE_HZ } from "./pcm.js";

const WINDOW = RATE_HZ / 50; // 20 ms
const AUDIBLE = 0.06; // of the loudest window of a turn

/** What was sent of the microphone, on the server's clock: milliseconds of sound sent. */
export class Input {
  #pieces = []; // {from, pcm, at}: its first sample, when it was heard
  #sent = 0; // samples

  get nowMs() {
    return milliseconds(this.#sent);
  }

  push(pcm, at) {
    this.#pieces.push({ from: this.#sent, pcm, at });
    this.#sent += pcm.length;
  }

  /** The server's clock begins anew, with what was heard since fromMs. Gives that, in pieces. */
  startAgain(fromMs) {
    const kept = this.#pieces.filter(({ from, pcm }) => milliseconds(from + pcm.length) > fromMs);
    this.#pieces = [];
    this.#sent = 0;
    for (const { pcm, at } of kept) this.push(pcm, at);
    return kept.map(({ pcm }) => pcm);
  }

  forgetBefore(ms) {
    const keep = this.#pieces.findIndex(({ from, pcm }) => milliseconds(from + pcm.length) > ms);
    this.#pieces.splice(0, keep < 0 ? this.#pieces.length : keep);
  }

  cut(fromMs, toMs) {
    const [from, to] = [fromMs, toMs].map((ms) => Math.round((ms * RATE_HZ) / 1000));
    return joined(
      this.#pieces.map((piece) =>
        piece.pcm.subarray(Math.max(0, from - piece.from), Math.max(0, to - piece.from)),
      ),
    );
  }

  /** When that moment was heard, on the clock of performance.now(). */
  timeOf(ms) {
    const piece = this.#pieces.findLast(({ from }) => milliseconds(from) <= ms);
    if (!piece) return performance.now();
    return piece.at - milliseconds(piece.from + piece.pcm.length) + ms;
  }
}

/** Milliseconds from the beginning of a turn to the end of its last loud part. */
export function endOfSpeechMs(pcm) {
  const energies = [];
  for (let at = 0; at < pcm.length; at += WINDOW) {
    const part = pcm.subarray(at, at + WINDOW);
    energies.push(part.reduce((sum, value) => sum + Math.abs(value), 0) / part.length);
  }
  const loud = AUDIBLE * Math.max(...energies, 0);
  return milliseconds((energies.findLastIndex((energy) => energy > loud) + 1) * WINDOW);
}
