/** Hands over what the microphone hears in pieces of `samples`. */
class MicrophoneProcessor extends AudioWorkletProcessor {
  #piece;
  #filled = 0;
  #closed = false;

  constructor({ processorOptions }) {
    super();
    this.#piece = new Float32Array(processorOptions.samples);
    this.port.onmessage = () => (this.#closed = true);
  }

  process([[heard]]) {
    for (const value of heard ?? []) {
      this.#piece[this.#filled] = value;
      this.#filled += 1;
      if (this.#filled === this.#piece.length) this.#send();
    }
    return !this.#closed;
  }

  #send() {
    const piece = this.#piece;
    this.#piece = new Float32Array(piece.length);
    this.#filled = 0;
    this.port.postMessage(piece, [piece.buffer]);
  }
}

registerProcessor("microphone", MicrophoneProcessor);
