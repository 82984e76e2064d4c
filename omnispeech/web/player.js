import { outlet } from "./outlets.js";
import { milliseconds, toFloats } from "./pcm.js";
import { Source } from "./source.js";

/**
 * Plays replies without a gap, in the order of their sound.
 *
 * Tells "progress" {item, playedMs, gaps, missingMs, level, finished}, and "stopped".
 */
export class Player extends Source {
  #context;
  #node; // held here, or it may be taken away while it plays
  #port;
  #heldS;
  #stops = []; // who waits for what was cut, in order

  /** context: running at 24 kHz */
  static async create(context) {
    return new Player(context, await outlet(context));
  }

  constructor(context, { node, port, heldS }) {
    super();
    this.#context = context;
    this.#node = node;
    this.#port = port;
    this.#heldS = heldS;
    this.#port.onmessage = ({ data }) => this.#heard(data);
    this.#node.connect(context.destination);
    this.active = false; // something is being played, or waits to be
  }

  push(item, pcm) {
    const floats = toFloats(pcm);
    this.active = true;
    this.#port.postMessage({ type: "push", item, floats }, [floats.buffer]);
  }

  /** No more sound of this reply will come: when it runs out, that is its end and no gap. */
  end(item) {
    this.#port.postMessage({ type: "end", item });
  }

  /** Silence at once. Gives [{item, playedMs}] of the replies that were cut. */
  stop() {
    this.#port.postMessage({ type: "stop" });
    return new Promise((resolve) => this.#stops.push(resolve));
  }

  #heard(message) {
    if (message.type === "stopped") this.#stopped(message.cut);
    else this.#progress(message);
  }

  #stopped(cut) {
    this.active = false;
    const done = this.#stops.shift();
    done(cut.map(({ item, played }) => ({ item, playedMs: this.#audible(played) })));
    this.emit("stopped");
  }

  #progress({ item, played, gaps, missing, level, finished, left }) {
    this.active = left > 0;
    this.emit("progress", {
      item,
      playedMs: this.#audible(played),
      gaps,
      missingMs: milliseconds(missing),
      level: finished ? 0 : level,
      finished,
    });
  }

  // What the device still holds has not been heard.
  #audible(played) {
    const latencyS = this.#context.outputLatency || this.#context.baseLatency || 0;
    return Math.max(0, Math.floor(milliseconds(played) - 1000 * (latencyS + this.#heldS)));
  }
}
