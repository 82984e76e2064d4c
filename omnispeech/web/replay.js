import { RATE_HZ, toFloats } from "./pcm.js";

/** Plays one recorded sound at a time; the same one again stops it. */
export class Replay {
  #source = null;
  #entry = null;

  toggle(context, entry, pcm) {
    const same = this.#entry === entry;
    this.stop();
    if (!same && pcm.length) this.#start(context, entry, pcm);
  }

  stop() {
    this.#source?.stop();
    this.#source = null;
    this.#entry = null;
  }

  #start(context, entry, pcm) {
    const buffer = context.createBuffer(1, pcm.length, RATE_HZ);
    buffer.copyToChannel(toFloats(pcm), 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    source.onended = () => {
      if (this.#source === source) this.stop();
    };
    source.start();
    this.#source = source;
    this.#entry = entry;
  }
}
