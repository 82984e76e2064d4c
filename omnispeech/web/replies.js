import { durationMs } from "./conversation.js";
import { fromBase64 } from "./pcm.js";
import { Source } from "./source.js";

// of an entry, by the status of its response
const STATES = { completed: "whole", incomplete: "limited", cancelled: "cut", failed: "failed" };

/**
 * What the model says: its text becomes an entry, its sound is played.
 *
 * Tells "changed", and "failed" (words of the server).
 */
export class Replies extends Source {
  #connection;
  #player;
  #conversation;
  #timings;
  #awaited = null; // Timing of a question that no reply was begun for
  #response = null; // under way: {id, item, begun, timing}
  #unwanted = false; // the next one to begin: it was cancelled before that
  #owed = false; // another one, once the one under way has ended
  #timingOf = new Map(); // by item
  #silenced = new Set(); // items that were cut: what still comes of them is not played

  constructor(connection, player, conversation, timings) {
    super();
    this.#connection = connection;
    this.#player = player;
    this.#conversation = conversation;
    this.#timings = timings;
    this.handlers = {
      "response.created": ({ response }) => this.#begin(response),
      "response.output_item.added": ({ item }) => this.#item(item),
      "response.output_audio_transcript.delta": (event) => this.#text(event),
      "response.output_text.delta": (event) => this.#text(event),
      "response.output_audio.delta": (event) => this.#sound(event),
      "response.output_audio.done": ({ item_id }) => this.#player.end(item_id),
      "response.done": ({ response }) => this.#done(response),
      "conversation.item.truncated": ({ item_id }) => this.#truncated(item_id),
      "conversation.item.retrieved": ({ item }) => this.#retrieved(item),
    };
  }

  /** Something is being said, or made. */
  get busy() {
    return this.#player.active || this.#response !== null || this.#awaited !== null;
  }

  /** A question was asked, and nothing of the reply is there. */
  get awaited() {
    return this.#awaited !== null || this.#response?.begun === false;
  }

  /** A question was asked: `timing` is of the next reply. null: there will be none. */
  await(timing) {
    this.#awaited = timing;
    this.emit("changed");
  }

  /** The user wants it to stop: the server stops making it, and the player playing it. */
  async interrupt() {
    const id = this.#response?.id; // none: it was asked for and has not begun
    if (id || this.#awaited) this.#send("response.cancel", id ? { response_id: id } : {});
    this.#unwanted ||= !id && this.#awaited !== null;
    this.#owed = false;
    this.await(null);
    await this.silence();
  }

  /** There was nothing to cancel: the next reply is meant to be heard. */
  nothingCancelled() {
    this.#unwanted = false;
  }

  /** One was asked for while another was under way: it is asked for again after that. */
  owe() {
    this.#owed = true;
  }

  /** Nothing more is heard at once; the server is told how much of it was. */
  async silence() {
    if (this.#response?.item) this.#silenced.add(this.#response.item);
    if (!this.#player.active) return;
    for (const { item, playedMs } of await this.#player.stop()) this.#cut(item, playedMs);
    this.emit("changed");
  }

  /** The connection is lost: what has come is played to its end. */
  lose() {
    if (this.#response?.item) this.#player.end(this.#response.item);
  }

  /** It is back. The server has cut the reply that was under way; it shall know where. */
  resume() {
    const entry = this.#response && this.#conversation.find(this.#response.item);
    if (entry?.pieces.length) this.#cut(entry.id, Math.floor(durationMs(entry)));
    else if (entry) this.#truncated(entry.id);
    this.forget();
  }

  forget() {
    this.lose();
    const entry = this.#response && this.#conversation.find(this.#response.item);
    if (entry?.state === "open") this.#conversation.change(entry, { state: "cut" });
    this.#awaited = null;
    this.#response = null;
    this.#unwanted = false;
    this.#owed = false;
    this.emit("changed");
  }

  /** What the player reports. */
  played({ item, gaps, missingMs, finished }) {
    const timing = this.#timingOf.get(item);
    if (timing && gaps !== timing.gaps) this.#timings.note(timing, { gaps, gapMs: missingMs });
    if (finished) this.emit("changed");
  }

  #begin({ id }) {
    if (this.#unwanted) {
      this.#unwanted = false;
      return;
    }
    const timing = this.#awaited ?? this.#timings.begin();
    this.#response = { id, item: null, begun: false, timing };
    this.#awaited = null;
    this.emit("changed");
  }

  #item({ id, type }) {
    if (type !== "message" || !this.#response) return;
    this.#response.item = id;
    this.#timingOf.set(id, this.#response.timing);
    this.#conversation.add(id, "assistant");
  }

  #text({ item_id, delta }) {
    const entry = this.#conversation.find(item_id);
    if (!entry || this.#silenced.has(item_id)) return;
    this.#mark(item_id, "firstText");
    this.#conversation.change(entry, { text: entry.text + delta });
  }

  #sound({ item_id, delta }) {
    const entry = this.#conversation.find(item_id);
    if (!entry || this.#silenced.has(item_id)) return;
    const pcm = fromBase64(delta);
    entry.pieces.push(pcm);
    this.#player.push(item_id, pcm);
    this.#mark(item_id, "firstSound");
  }

  #mark(item, name) {
    this.#timings.mark(this.#timingOf.get(item), name);
    if (this.#response?.item !== item || this.#response.begun) return;
    this.#response.begun = true;
    this.emit("changed");
  }

  #done(response) {
    const { item, timing } = this.#response ?? {};
    this.#response = null;
    if (item) this.#finish(item, timing, response.status);
    if (response.status === "failed") {
      this.emit("failed", response.status_details?.error?.message ?? "the reply failed");
    }
    if (this.#owed) this.#send("response.create");
    this.#owed = false;
    this.emit("changed");
  }

  #finish(item, timing, status) {
    const entry = this.#conversation.find(item);
    this.#player.end(item);
    this.#timings.note(timing, { soundMs: durationMs(entry) });
    this.#timings.mark(timing, "done");
    if (entry.state === "open") this.#conversation.change(entry, { state: STATES[status] });
  }

  #cut(item, playedMs) {
    const entry = this.#conversation.find(item);
    this.#silenced.add(item);
    if (!entry) return;
    this.#conversation.change(entry, { state: "cut", heardMs: playedMs });
    const place = { item_id: item, content_index: 0, audio_end_ms: playedMs };
    this.#send("conversation.item.truncate", place);
  }

  // What the server keeps of a cut reply is what the model will remember of it.
  #truncated(item) {
    this.#send("conversation.item.retrieve", { item_id: item });
  }

  #retrieved({ id, content }) {
    const entry = this.#conversation.find(id);
    const heardText = content[0]?.transcript ?? content[0]?.text ?? "";
    if (entry) this.#conversation.change(entry, { heardText });
  }

  #send(type, fields = {}) {
    this.#connection.send({ type, ...fields });
  }
}
