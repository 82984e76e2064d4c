import { Connection } from "./connection.js";
import { Microphone } from "./microphone.js";
import { RATE_HZ } from "./pcm.js";
import { Player } from "./player.js";
import { Source } from "./source.js";
import { Talk } from "./talk.js";

const KEPT_AS = "omnispeech.key";
const LAST_PIECE_MS = 60; // what the microphone still holds when the button is let go

/**
 * From start to end: the sound devices, the connection, and who may be heard.
 *
 * Tells "changed", "session" {session, isNew}, "trouble" {message, param}, "lost" {waitS, known},
 * "resumed", "closed" {kind, reason}, "microphone" when there is one, "deaf" (why there is none),
 * "replaced" (the one chosen broke off, and the default one is opened), "unrouted" (why the
 * loudspeaker cannot be used), "short" (a press too short to be speech), "heard" (level),
 * "played" (level).
 */
export class Call extends Source {
  #conversation;
  #timings;
  #connection = null;
  #microphone = null;
  #player = null;
  #devices = { microphone: "", loudspeaker: "" }; // their ids; "": the default one
  #waiting = []; // who waits for a session

  constructor(conversation, timings) {
    super();
    this.#conversation = conversation;
    this.#timings = timings;
    this.context = null;
    this.talk = null;
    this.handsFree = true;
    this.muted = false;
    this.wantsMicrophone = true; // else all is typed, or sent as files
    this.asking = false; // for the microphone
    this.on("changed", () => this.#tellWhoWaits());
  }

  get state() {
    if (!this.#connection) return "idle";
    return this.#connection.isOpen ? "open" : "connecting";
  }

  get hasMicrophone() {
    return this.#microphone !== null;
  }

  /** Needs to be called from a press of a button or key: else browsers stay silent. */
  async start() {
    if (this.#connection) return;
    const connection = new Connection(sessionStorage.getItem(KEPT_AS));
    this.#connection = connection;
    this.emit("changed");
    try {
      await this.prepareSound();
      this.#player ??= await this.#newPlayer();
    } catch (error) {
      return this.#fail(connection, error.message);
    }
    if (connection === this.#connection) this.#open(connection); // else it was ended meanwhile
  }

  async prepareSound() {
    this.context ??= new AudioContext({ sampleRate: RATE_HZ, latencyHint: "interactive" });
    await this.context.resume();
    await this.#route().catch(() => {}); // `choose` tells of it, once devices are named
  }

  /** Until there is a session; false if there will be none. */
  opened() {
    if (this.state !== "connecting") return Promise.resolve(this.state === "open");
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  /** Ids of the devices from now on; "": the default one. */
  async choose({ microphone, loudspeaker }) {
    const other = microphone !== this.#devices.microphone;
    this.#devices = { microphone, loudspeaker };
    if (other && this.#hears) this.#changeMicrophone();
    await this.#route().catch(({ message }) => this.emit("unrouted", message));
  }

  /** Starts with another key. */
  unlock(key) {
    sessionStorage.setItem(KEPT_AS, key);
    return this.start();
  }

  async end() {
    this.#connection?.close();
    await this.talk?.replies.silence();
    this.#stop();
  }

  async openMicrophone(id = this.#devices.microphone) {
    this.wantsMicrophone = true;
    if (this.#microphone || this.asking) return;
    this.#ask(true);
    const { microphone: chosen } = this.#devices;
    const microphone = await Microphone.open(this.context, id).catch(({ reason }) => {
      this.#deafen(reason);
    });
    this.#ask(false);
    if (!this.#connection) return microphone?.close();
    if (microphone) this.#useMicrophone(microphone);
    if (chosen !== this.#devices.microphone) this.#changeMicrophone(); // chosen meanwhile
  }

  tryNow() {
    this.#connection?.open();
  }

  mute(muted) {
    if (muted && !this.muted) this.talk?.questions.mute();
    this.muted = muted;
    this.emit("changed");
  }

  async press() {
    await this.talk?.press();
  }

  release() {
    const at = performance.now();
    setTimeout(() => {
      if (this.talk?.questions.release(at) === false) this.emit("short");
    }, LAST_PIECE_MS);
  }

  #ask(asking) {
    this.asking = asking;
    this.emit("changed");
  }

  get #hears() {
    return this.hasMicrophone || (this.state === "open" && this.wantsMicrophone);
  }

  #useMicrophone(microphone) {
    this.#microphone = microphone;
    microphone.on("piece", (piece) => this.#hear(piece));
    microphone.on("lost", () => microphone === this.#microphone && this.#loseMicrophone());
    this.emit("changed");
    this.emit("microphone");
  }

  // One after the other: some systems give a page no second microphone.
  #changeMicrophone() {
    if (this.#microphone?.id === this.#devices.microphone) return;
    this.#closeMicrophone();
    this.openMicrophone();
  }

  #closeMicrophone() {
    this.#microphone?.close();
    this.#microphone = null;
    this.emit("heard", 0);
  }

  async #route() {
    const { loudspeaker } = this.#devices;
    if ((this.context?.sinkId ?? loudspeaker) === loudspeaker) return;
    await this.context.setSinkId(loudspeaker);
  }

  #tellWhoWaits() {
    if (this.state === "connecting") return;
    for (const resolve of this.#waiting.splice(0)) resolve(this.state === "open");
  }

  async #newPlayer() {
    const player = await Player.create(this.context);
    player.on("progress", (report) => {
      this.talk.replies.played(report);
      this.emit("played", report.level);
    });
    player.on("stopped", () => this.emit("played", 0));
    return player;
  }

  // The player is a file of the server, too; a context does not ask twice for one that failed.
  // Systems may also keep the sound back, as during a call.
  #fail(connection, reason) {
    connection.close();
    this.context?.close();
    this.context = null;
    this.#player = null;
    if (connection !== this.#connection) return;
    this.#stop();
    this.emit("closed", { kind: "unreachable", reason });
  }

  #open(connection) {
    this.talk = new Talk(connection, this.#player, this.#conversation, this.#timings);
    this.talk.on("phase", () => this.emit("changed"));
    this.talk.on("session", (detail) => this.emit("session", detail));
    this.talk.on("trouble", (detail) => this.emit("trouble", detail));
    connection.on("open", ({ resumed }) => this.emit(resumed ? "resumed" : "changed"));
    connection.on("lost", (detail) => this.emit("lost", detail));
    connection.on("closed", (detail) => {
      this.#stop();
      this.emit("closed", detail);
    });
    connection.open();
  }

  #stop() {
    this.#connection = null;
    this.#closeMicrophone();
    this.talk?.questions.forget();
    this.talk?.replies.forget();
    this.muted = false;
    this.emit("changed");
  }

  #hear({ pcm, level }) {
    const taken = this.handsFree ? !this.muted : this.talk.questions.open;
    this.emit("heard", taken ? level : 0);
    if (taken) this.talk.questions.hear(pcm);
  }

  // One that was chosen is replaced by the default one, until `choose` is told of another or that
  // it is back: being listed, it may break off whenever it is opened.
  #loseMicrophone() {
    const { id } = this.#microphone;
    this.#closeMicrophone();
    if (!id) return this.#deafen("unplugged");
    this.emit("replaced");
    this.openMicrophone("");
  }

  #deafen(reason) {
    const { questions } = this.talk;
    if (this.handsFree && questions.open) questions.mute(); // else the server waits for its end
    this.emit("changed");
    this.emit("deaf", reason);
  }
}
