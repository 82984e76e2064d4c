import { Source } from "./source.js";

const PAUSES_S = [0.25, 0.5, 1, 2, 4, 8]; // between attempts, the last one again and again
const GIVE_UP_S = 300;
const STEADY_S = 5; // a connection this old was no false start
const KEPT = 1200; // events that wait while there is no connection: 60 s of sound
const EXPIRED = "session_expired"; // what the server says of a session that it forgot
const REASONS = { 1000: "ended", 1001: "stopping", 1008: "key", 1012: "stopping", 1013: "full" };

/**
 * The WebSocket of one conversation; it comes back when it was lost.
 *
 * Tells "message" (event of the server), "open" {session, resumed}, "lost" {waitS, first, known}
 * before each further attempt (known: there was a session), and "closed" {kind, reason} once it
 * is over. kind: "ended", "stopping", "full", "key" or "unreachable".
 */
export class Connection extends Source {
  #socket = null;
  #session = null;
  #key;
  #attempt = 0;
  #lostAt = 0;
  #timer = 0;
  #kept = [];
  #expired = false;

  constructor(key) {
    super();
    this.#key = key;
    this.isOpen = false; // a session is there
    window.addEventListener("offline", this.#abandon);
  }

  open() {
    this.#drop();
    const protocols = ["realtime"];
    if (this.#key) protocols.push(`openai-insecure-api-key.${this.#key}`);
    this.#socket = new WebSocket(this.#address(), protocols);
    this.#socket.onmessage = ({ data }) => this.#receive(JSON.parse(data));
    this.#socket.onclose = ({ code, reason }) => this.#gone(code, reason);
  }

  /** While the connection is lost, events wait for it; a new session never sees them. */
  send(event) {
    if (this.isOpen) this.#socket.send(JSON.stringify(event));
    else if (this.#session && this.#kept.length < KEPT) this.#kept.push(event);
  }

  close() {
    window.removeEventListener("offline", this.#abandon);
    this.#drop(1000);
  }

  // A network that is gone closes nothing: without this it would be noticed after minutes.
  #abandon = () => {
    if (!this.isOpen) return;
    this.#drop();
    this.#again();
  };

  // Without a code the server keeps the conversation for whoever comes back.
  #drop(...code) {
    clearTimeout(this.#timer);
    this.isOpen = false;
    if (!this.#socket) return;
    this.#socket.onmessage = null;
    this.#socket.onclose = null;
    this.#socket.close(...code);
  }

  #address() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const query = new URLSearchParams({ model: "omnispeech" });
    if (this.#session) query.set("resume", this.#session.id);
    return `${scheme}://${location.host}/v1/realtime?${query}`;
  }

  #receive(event) {
    if (event.error?.code === EXPIRED) this.#expired = true;
    else if (event.type === "session.created") this.#begin(event.session);
    if (!this.#expired) this.emit("message", event);
  }

  #begin(session) {
    const resumed = session.id === this.#session?.id;
    const kept = resumed ? this.#kept : [];
    this.#kept = [];
    this.#session = session;
    this.#lostAt = 0;
    this.isOpen = true;
    this.#timer = setTimeout(() => (this.#attempt = 0), 1000 * STEADY_S);
    for (const event of kept) this.send(event);
    this.emit("open", { session, resumed });
  }

  #gone(code, reason) {
    this.#drop();
    if (this.#expired) this.#startAnew();
    else if (code in REASONS) this.#end(REASONS[code], reason);
    else this.#again();
  }

  #startAnew() {
    this.#expired = false;
    this.#session = null;
    this.open();
  }

  #again() {
    const first = this.#lostAt === 0;
    this.#lostAt ||= performance.now();
    if (performance.now() - this.#lostAt > 1000 * GIVE_UP_S) return this.#end("unreachable", "");
    const waitS = PAUSES_S[Math.min(this.#attempt, PAUSES_S.length - 1)];
    this.#attempt += 1;
    this.#timer = setTimeout(() => this.open(), 1000 * waitS);
    this.emit("lost", { waitS, first, known: this.#session !== null });
  }

  #end(kind, reason) {
    window.removeEventListener("offline", this.#abandon);
    this.emit("closed", { kind, reason });
  }
}
