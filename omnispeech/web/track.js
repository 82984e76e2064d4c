/** The sound of one reply on its way to the loudspeaker. Runs in the audio thread. */

const PRIME = 0.08 * 24000; // samples that must wait before the first is played
const PRIME_AGAIN = 0.24 * 24000; // likewise after the sound ran out

export class Track {
  #pieces = [];
  #offset = 0; // into the first piece
  #primed = false;
  #silence = 0; // samples since the sound ran out: a gap once more sound comes

  constructor(item) {
    this.item = item;
    this.ended = false; // nothing more will come
    this.queued = 0; // samples
    this.played = 0; // samples
    this.gaps = 0; // times the sound ran out too early
    this.missing = 0; // samples of silence in those gaps
  }

  get finished() {
    return this.ended && this.queued === 0;
  }

  push(floats) {
    this.#pieces.push(floats);
    this.queued += floats.length;
  }

  /** Fills `out` from `start`; returns how many samples it took. Less: the sound ran out. */
  read(out, start) {
    if (!this.#ready()) {
      this.#silence += this.played ? out.length - start : 0;
      return 0;
    }
    let at = start;
    while (at < out.length && this.#pieces.length) at += this.#readPiece(out, at);
    this.queued -= at - start;
    this.played += at - start;
    if (at < out.length && !this.ended) {
      this.#primed = false;
      this.#silence += out.length - at;
    }
    return at - start;
  }

  #ready() {
    if (this.#primed) return true;
    this.#primed = this.ended || this.queued >= (this.played ? PRIME_AGAIN : PRIME);
    if (this.#primed && this.queued) this.#countGap();
    return this.#primed;
  }

  #countGap() {
    this.gaps += this.#silence ? 1 : 0;
    this.missing += this.#silence;
    this.#silence = 0;
  }

  #readPiece(out, at) {
    const piece = this.#pieces[0];
    const count = Math.min(out.length - at, piece.length - this.#offset);
    out.set(piece.subarray(this.#offset, this.#offset + count), at);
    this.#offset += count;
    if (this.#offset === piece.length) {
      this.#pieces.shift();
      this.#offset = 0;
    }
    return count;
  }
}
