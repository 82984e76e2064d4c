import { button, element, icon } from "./elements.js";

const KEY = "\\s*[A-Za-z0-9!#$%&'*+.^_`\\|~\\-]+\\s*"; // what the name of a subprotocol may hold

/** What can be in the way, in words: [title, what to do]. */
const WORDS = {
  permission: [
    "The microphone is blocked",
    "Allow it in the browser's address bar, then try again. Typing and files work without it.",
  ],
  missing: [
    "No microphone was found",
    "Connect one and try again, or type your question, or send a sound file.",
  ],
  busy: [
    "The microphone is in use",
    "Another program holds it, or the system keeps it back. Close that program and try again.",
  ],
  insecure: [
    "This address may not use the microphone",
    "Browsers allow it on https:// and localhost alone. Type your question, or open the page " +
      "there: ssh -L 8000:localhost:8000 to the server, with its port, or give it a certificate.",
  ],
  failed: ["The microphone could not be opened", "Try again, type your question, or send a file."],
  unplugged: ["The microphone went away", "Connect it again, then go on."],
  gone: [
    "A device is not connected",
    "The default one is used until it is back, or until you choose another in the settings.",
  ],
  loudspeaker: [
    "The loudspeaker cannot be used",
    "The sound comes where it came before. Choose another in the settings, or connect it again.",
  ],
  full: ["The server has no place free", "It is full, or still starting. The page tries again."],
  stopping: ["The server is stopping", "It takes no more questions. It may be back in a moment."],
  ended: ["The conversation has ended", "Start again when you like; what was said stays here."],
  unreachable: ["The server cannot be reached", "It does not answer. Is it running?"],
  lost: ["The connection was lost", "What was said is kept; the page connects again by itself."],
  connecting: ["The server does not answer", "The page goes on trying."],
  key: ["The server wants a key", "Enter the API key you were given; this tab keeps it."],
};

/** The one thing that is in the way now, with what can be done about it. */
export class Notices {
  #place;
  #timer = 0;

  constructor(place) {
    this.#place = place;
    this.shown = null; // its kind
  }

  clear() {
    clearInterval(this.#timer);
    this.shown = null;
    this.#place.replaceChildren();
  }

  /** What was in the way is no more; anything else stays. */
  withdraw(kind) {
    if (this.shown === kind) this.clear();
  }

  /** actions: [[label, what it does], ...] */
  show(kind, actions = [], reason = "") {
    this.clear();
    this.shown = kind;
    this.#place.append(this.#box(kind, reason, buttons(actions)));
  }

  /** Shows how long it is until `then` happens; without `then` somebody else sees to it. */
  countDown(waitS, then = null) {
    const left = element("span", { class: "countdown", "aria-hidden": "true" });
    this.#place.querySelector(".actions").append(left);
    const end = performance.now() + 1000 * waitS;
    const count = () => {
      const seconds = Math.max(0, Math.ceil((end - performance.now()) / 1000));
      left.textContent = `again in ${seconds} s`; // not read aloud, second by second
      if (seconds === 0 && then) then();
    };
    count();
    this.#timer = setInterval(count, 250);
  }

  /** enter(key) */
  askKey(enter, reason) {
    const input = element("input", {
      type: "password",
      name: "key",
      autocomplete: "off",
      "aria-label": "API key",
      placeholder: "API key",
      required: "",
      pattern: KEY,
      title: "letters, digits and !#$%&'*+.^_`|~-",
    });
    const form = element("form", {}, input, element("button", { class: "primary" }, "Connect"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      enter(input.value.trim());
    });
    this.clear();
    this.shown = "key";
    this.#place.append(this.#box("key", reason, [form]));
    input.focus();
  }

  #box(kind, reason, actions) {
    const [title, text] = WORDS[kind];
    return element(
      "div",
      { class: "notice", "data-kind": kind },
      icon("warning"),
      element("div", {}, element("strong", {}, title), element("p", {}, text), said(reason)),
      element("div", { class: "actions" }, ...actions),
    );
  }
}

const said = (reason) => (reason ? element("p", { class: "reason" }, reason) : null);

const buttons = (actions) =>
  actions.map(([label, action], index) => button(label, action, index ? {} : { class: "primary" }));
