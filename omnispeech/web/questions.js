import { endOfSpeechMs, Input } from "./input.js";
import { RATE_HZ, toBase64 } from "./pcm.js";
import { Source } from "./source.js";

const SHORTEST_MS = 150; // a touch shorter than this was no speech
const KEPT_MS = 3000; // of sound while nobody speaks: more than the server pads a turn with
// Of silence, so that the server ends a turn when the microphone goes off: more than the longest
// pause of the settings.
const MUTED_S = 2.5;

/**
 * What the user says: the sound goes to the server, the turns become entries.
 *
 * Tells "started" when the server hears speech, "asked" (Timing) when it has a whole question,
 * and "changed".
 */
export class Questions extends Source {
  #connection;
  #conversation;
  #timings;
  #input = new Input();
  #turn = null; // being said: {fromMs, toMs, item, releasedAt}
  #count = 0; // of questions that were not spoken
  #sent = new Map(); // those not yet taken: their Timing, by id
  #unanswered = false; // one was taken, and no answer asked for

  constructor(connection, conversation, timings) {
    super();
    this.#connection = connection;
    this.#conversation = conversation;
    this.#timings = timings;
    this.handlers = {
      "input_audio_buffer.speech_started": (event) => this.#speechStarted(event),
      "input_audio_buffer.speech_stopped": (event) => this.#speechStopped(event),
      "input_audio_buffer.committed": (event) => this.#committed(event),
      "input_audio_buffer.cleared": () => this.forget(),
      "conversation.item.added": ({ item }) => this.#added(item),
      "conversation.item.input_audio_transcription.delta": (event) => this.#transcribed(event),
      "conversation.item.input_audio_transcription.completed": (event) => this.#written(event),
    };
  }

  /** Somebody is speaking, as far as the server or the button knows. */
  get open() {
    return this.#turn !== null && this.#turn.toMs === undefined;
  }

  /** A new session: its clock begins at 0. */
  restart() {
    this.#input = new Input();
    this.withhold();
    this.forget();
  }

  /** The connection is lost, and with it what was not asked yet: that is said once more. */
  lose() {
    this.withhold(); // whether it was taken will not be told
    const { fromMs = Infinity, toMs, item } = this.#turn ?? {};
    for (const pcm of this.#input.startAgain(toMs === undefined ? fromMs : Infinity)) {
      this.#append(pcm);
    }
    if (item || toMs !== undefined) this.forget();
    else if (this.#turn) this.#turn.fromMs = 0;
  }

  /** No answer is wanted to what is on its way. */
  withhold() {
    this.#sent.clear();
    this.#unanswered = false;
  }

  /** The server takes no such question. */
  refused(id) {
    const entry = this.#conversation.find(id);
    if (!entry) return;
    this.#conversation.change(entry, { state: "failed" });
    this.#settle(id);
  }

  /** What was being said is not asked. */
  forget() {
    const entry = this.#turn?.item && this.#conversation.find(this.#turn.item);
    if (entry?.state === "open") this.#conversation.remove(entry);
    this.#turn = null;
    this.emit("changed");
  }

  hear(pcm) {
    this.#append(pcm);
    this.#input.push(pcm, performance.now());
    if (!this.#turn) this.#input.forgetBefore(this.#input.nowMs - KEPT_MS);
  }

  /** The microphone goes off: the server hears silence, and so the end of a turn. */
  mute() {
    this.hear(new Int16Array(MUTED_S * RATE_HZ));
  }

  press() {
    this.#turn = { fromMs: this.#input.nowMs };
    this.emit("changed");
  }

  /** at: when the button was let go. Gives false if there was too little to ask. */
  release(at) {
    if (!this.open) return true;
    Object.assign(this.#turn, { toMs: this.#input.nowMs, releasedAt: at });
    if (this.#turn.toMs - this.#turn.fromMs < SHORTEST_MS) return this.#discard();
    this.#send("input_audio_buffer.commit");
    this.#send("response.create");
    this.emit("changed");
    return true;
  }

  /** A whole recording, beside what the microphone hears; shown here, and sent by `ask`. */
  recorded(pcm, name) {
    const entry = this.#enter(name, [pcm]);
    return { entry, part: { type: "input_audio", audio: toBase64(pcm) } };
  }

  /** What was typed; likewise. */
  typed(text) {
    return { entry: this.#enter(text, []), part: { type: "input_text", text } };
  }

  ask({ entry, part }) {
    const item = { id: entry.id, type: "message", role: "user", content: [part] };
    const timing = this.#timings.begin();
    this.#sent.set(entry.id, timing);
    this.#send("conversation.item.create", { item, event_id: entry.id });
    this.emit("asked", timing);
  }

  #enter(text, pieces) {
    this.#count += 1;
    const id = `asked_${Date.now().toString(36)}_${this.#count}`;
    const entry = this.#conversation.add(id, "user", text);
    this.#conversation.change(entry, { pieces, state: "whole" });
    return entry;
  }

  #added({ id }) {
    if (!this.#sent.has(id)) return;
    this.#timings.note(this.#sent.get(id), { asked: performance.now() });
    this.#unanswered = true;
    this.#settle(id);
  }

  // Asked for earlier, an answer would come to what was said before a question that is refused.
  // Several that were sent together have one answer.
  #settle(id) {
    this.#sent.delete(id);
    if (this.#sent.size || !this.#unanswered) return;
    this.#unanswered = false;
    this.#send("response.create");
  }

  #append(pcm) {
    this.#send("input_audio_buffer.append", { audio: toBase64(pcm) });
  }

  #discard() {
    this.#send("input_audio_buffer.clear");
    this.forget();
    return false;
  }

  #speechStarted({ audio_start_ms, item_id }) {
    this.#turn = { fromMs: audio_start_ms, item: item_id };
    this.#conversation.add(item_id, "user");
    this.emit("started");
  }

  #speechStopped({ audio_end_ms }) {
    if (this.#turn) this.#turn.toMs = audio_end_ms;
    this.emit("changed");
  }

  #committed({ item_id }) {
    const turn = this.#turn ?? { fromMs: 0, toMs: 0 };
    const toMs = turn.toMs ?? this.#input.nowMs;
    const pcm = this.#input.cut(turn.fromMs, toMs);
    const spokenTill = turn.releasedAt ?? this.#input.timeOf(turn.fromMs + endOfSpeechMs(pcm));
    this.#turn = null;
    this.#input.forgetBefore(toMs);
    const entry = this.#conversation.add(item_id, "user");
    this.#conversation.change(entry, { pieces: pcm.length ? [pcm] : [], state: "whole" });
    this.emit("asked", this.#timings.begin(spokenTill));
  }

  #transcribed({ item_id, delta }) {
    const entry = this.#conversation.find(item_id);
    if (entry) this.#conversation.change(entry, { text: entry.text + delta });
  }

  #written({ item_id, transcript }) {
    const entry = this.#conversation.find(item_id);
    if (entry) this.#conversation.change(entry, { text: transcript });
  }

  #send(type, fields = {}) {
    this.#connection.send({ type, ...fields });
  }
}
