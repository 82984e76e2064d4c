import { RATE_HZ, loudness, toPcm } from "./pcm.js";
import { Resampler } from "./resampler.js";
import { Source } from "./source.js";

const PIECE_S = 0.05;
const WANTED = {
  echoCancellation: true,
  noiseSuppression: true,
  autoGainControl: true,
  channelCount: 1,
};
const NOT_THERE = ["OverconstrainedError", "NotFoundError"];
const REASONS = {
  NotAllowedError: "permission",
  SecurityError: "permission",
  NotFoundError: "missing",
  OverconstrainedError: "missing",
  NotReadableError: "busy",
  AbortError: "busy",
};

/** Why there is no microphone: "permission", "missing", "busy", "insecure" or "failed". */
export class MicrophoneError extends Error {
  constructor(reason, cause) {
    super(cause?.message ?? reason, { cause });
    this.reason = reason;
  }
}

/** Tells "piece" {pcm (24 kHz), level} every 50 ms, and "lost" when the device goes away. */
export class Microphone extends Source {
  #stream;
  #node = null;
  #context;

  /**
   * context: running at 24 kHz. id: of the device; the default one stands in for it, as for "".
   * Raises MicrophoneError.
   */
  static async open(context, id) {
    if (!navigator.mediaDevices?.getUserMedia) throw new MicrophoneError("insecure");
    let microphone = null;
    try {
      microphone = new Microphone(await streamOf(id), id);
      await microphone.#listen(context);
      return microphone;
    } catch (error) {
      microphone?.close();
      throw new MicrophoneError(REASONS[error.name] ?? "failed", error);
    }
  }

  constructor(stream, id) {
    super();
    this.id = id;
    this.#stream = stream;
    for (const track of stream.getTracks()) {
      track.addEventListener("ended", () => this.emit("lost"));
    }
  }

  close() {
    for (const track of this.#stream.getTracks()) track.stop();
    if (this.#node) this.#silence(this.#node);
    this.#context?.close();
  }

  async #listen(context) {
    try {
      await this.#connect(context, (floats) => floats);
    } catch (error) {
      if (error.name !== "NotSupportedError") throw error;
      await this.#listenAtItsRate(); // some browsers join no context of another rate
    }
    const ended = this.#stream.getTracks().some(({ readyState }) => readyState === "ended");
    if (ended) throw new DOMException("the microphone broke off", "AbortError");
  }

  async #listenAtItsRate() {
    this.#context = new AudioContext();
    const resampler = new Resampler(this.#context.sampleRate, RATE_HZ);
    await this.#connect(this.#context, (floats) => resampler.push(floats));
  }

  async #connect(context, resampled) {
    const source = context.createMediaStreamSource(this.#stream);
    await context.audioWorklet.addModule("/page/microphone-worklet.js");
    const node = new AudioWorkletNode(context, "microphone", {
      numberOfOutputs: 0,
      processorOptions: { samples: Math.round(PIECE_S * context.sampleRate) },
    });
    node.port.onmessage = ({ data }) => this.#hear(resampled(data));
    source.connect(node);
    this.#node = node;
  }

  // The node outlives its microphone in the context, and would go on with pieces of silence.
  #silence({ port }) {
    port.onmessage = null;
    port.postMessage("close");
  }

  #hear(floats) {
    this.emit("piece", { pcm: toPcm(floats), level: loudness(floats) });
  }
}

// Chromium takes an id that is wished for, and not demanded, for no wish at all.
async function streamOf(id) {
  const open = (audio) => navigator.mediaDevices.getUserMedia({ audio });
  if (!id) return open(WANTED);
  try {
    return await open({ ...WANTED, deviceId: { exact: id } });
  } catch (error) {
    if (!NOT_THERE.includes(error.name)) throw error;
    return open(WANTED);
  }
}
