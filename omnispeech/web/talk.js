import { Questions } from "./questions.js";
import { Replies } from "./replies.js";
import { Source } from "./source.js";

const NOT_ACTIVE = "response_cancel_not_active"; // what the user meant has happened already
const ACTIVE = "conversation_already_has_active_response"; // to what was said at the same moment
const EMPTY = "input_audio_buffer_commit_empty";
const SETTING = /^session\b/; // an error about one of these ends no turn
const UNANSWERED = "The connection was lost before an answer came. Please ask again.";
const ANEW = "The server no longer remembers what was said above. This is a new conversation.";

/**
 * One conversation over one connection.
 *
 * Tells "phase", "session" (the settings in effect, and whether the session is new) and
 * "trouble" {message, param}.
 */
export class Talk extends Source {
  #connection;
  #conversation;

  constructor(connection, player, conversation, timings) {
    super();
    this.#connection = connection;
    this.#conversation = conversation;
    this.questions = new Questions(connection, conversation, timings);
    this.replies = new Replies(connection, player, conversation, timings);
    this.#join();
  }

  /** "hearing", "thinking", "answering" or "listening" */
  get phase() {
    if (this.questions.open) return "hearing";
    if (this.replies.awaited) return "thinking";
    return this.replies.busy ? "answering" : "listening";
  }

  configure(session) {
    this.#connection.send({ type: "session.update", session: { type: "realtime", ...session } });
  }

  /** The user begins to speak with the button held. */
  async press() {
    this.questions.press();
    await this.interrupt();
  }

  /** The user wants to hear no answer, neither one under way nor one just asked for. */
  async interrupt() {
    this.questions.withhold();
    await this.replies.interrupt();
  }

  /** A recording, beside what the microphone hears. */
  async send(pcm, name) {
    await this.#ask(this.questions.recorded(pcm, name));
  }

  async write(text) {
    await this.#ask(this.questions.typed(text));
  }

  async #ask(question) {
    await this.replies.interrupt();
    this.questions.ask(question);
  }

  #join() {
    const handlers = {
      ...this.questions.handlers,
      ...this.replies.handlers,
      "session.updated": ({ session }) => this.emit("session", { session, isNew: false }),
      error: ({ error }) => this.#troubled(error),
    };
    const change = () => this.emit("phase");
    this.#connection.on("message", (event) => handlers[event.type]?.(event));
    this.#connection.on("open", (opened) => this.#opened(opened));
    this.#connection.on("lost", (how) => this.#lose(how));
    this.questions.on("started", () => this.replies.silence().then(change));
    this.questions.on("asked", (timing) => this.replies.await(timing));
    this.questions.on("changed", change);
    this.replies.on("changed", change);
    this.replies.on("failed", (message) => this.emit("trouble", { message }));
  }

  #opened({ session, resumed }) {
    if (resumed) return this.replies.resume();
    if (this.#conversation.entries.length) this.#conversation.note(ANEW);
    this.questions.restart();
    this.replies.forget();
    this.emit("session", { session, isNew: true });
  }

  #lose({ first, known }) {
    if (!first || !known) return;
    if (this.replies.awaited) this.#conversation.note(UNANSWERED);
    this.questions.lose();
    this.replies.lose();
  }

  #troubled({ code, message, param, event_id }) {
    if (code === NOT_ACTIVE) return this.replies.nothingCancelled();
    if (code === ACTIVE) return this.replies.owe();
    this.questions.refused(event_id);
    if (!SETTING.test(param ?? "")) this.#giveUp();
    if (code !== EMPTY) this.emit("trouble", { message, param });
  }

  #giveUp() {
    if (!this.questions.open) this.questions.forget();
    this.replies.await(null);
  }
}
