import { durationMs, heard } from "./conversation.js";
import { button, drawing, element, icon } from "./elements.js";
import { outline } from "./pcm.js";

const NAMES = { user: "You", assistant: "omnispeech", note: "" };
const BADGES = { cut: "interrupted", failed: "failed", limited: "length limit" };
const BARS = 40;
const NEAR_END = 160; // pixels: whoever scrolled further up reads, and is not moved

/** The conversation as a list; all texts are set as text. */
export class Transcript {
  #list;
  #rows = new Map();
  #play;

  /** play(entry): called by the button beside a sound */
  constructor(list, conversation, play) {
    this.#list = list;
    this.#play = play;
    conversation.on("added", (entry) => this.#add(entry));
    conversation.on("changed", (entry) => this.#show(entry));
    conversation.on("removed", (entry) => this.#remove(entry));
  }

  #add(entry) {
    const row = element("li", { class: `entry ${entry.role}` });
    this.#rows.set(entry.id, row);
    this.#list.append(row);
    this.#show(entry);
  }

  #remove(entry) {
    this.#rows.get(entry.id)?.remove();
    this.#rows.delete(entry.id);
  }

  #show(entry) {
    const row = this.#rows.get(entry.id);
    const follow = this.#atEnd();
    row.dataset.state = entry.state;
    row.setAttribute("aria-busy", String(entry.state === "open"));
    row.replaceChildren(...parts(entry, this.#play));
    if (follow) row.scrollIntoView({ block: "nearest" });
  }

  #atEnd() {
    const page = document.scrollingElement;
    return page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END;
  }
}

function parts(entry, play) {
  if (entry.role === "note") return [words(entry)];
  return [head(entry), words(entry), waiting(entry), sound(entry, play)].filter(Boolean);
}

function words(entry) {
  if (!entry.text) return null;
  const heardText = entry.heardText ?? entry.text;
  const known = entry.text.startsWith(heardText) ? heardText.length : entry.text.length;
  const rest = entry.text.slice(known);
  const unheard = rest ? element("s", { title: "not heard" }, rest) : null;
  return element("p", { class: "words", dir: "auto" }, entry.text.slice(0, known), unheard);
}

function head(entry) {
  const time = entry.at.toTimeString().slice(0, 5);
  const badge = BADGES[entry.state];
  return element(
    "p",
    { class: "head" },
    element("span", { class: "who" }, NAMES[entry.role]),
    element("time", {}, time),
    badge ? element("span", { class: "badge" }, badge) : null,
  );
}

const waiting = (entry) =>
  entry.state === "open" && !entry.text && entry.role === "user"
    ? element("p", { class: "listening" }, "Listening")
    : null;

function sound(entry, play) {
  if (entry.state === "open" || !entry.pieces.length) return null;
  const label = entry.role === "user" ? "Play what you said" : "Play this reply";
  const start = button(icon("play"), () => play(entry), { class: "play", "aria-label": label });
  const seconds = element("span", {}, length(entry));
  return element("div", { class: "sound" }, start, shape(entry), seconds);
}

function shape(entry) {
  const peaks = outline(heard(entry), BARS);
  const tallest = Math.max(0.05, ...peaks);
  const bars = peaks.map((peak, index) => {
    const height = Math.max(2, (22 * peak) / tallest);
    return drawing("rect", { x: index * 4, y: 12 - height / 2, width: 2, height, rx: 1 });
  });
  const size = { viewBox: `0 0 ${BARS * 4} 24`, class: "outline", "aria-hidden": "true" };
  return drawing("svg", size, ...bars);
}

function length(entry) {
  const whole = `${(durationMs(entry) / 1000).toFixed(1)} s`;
  return entry.heardMs === null ? whole : `${(entry.heardMs / 1000).toFixed(1)} of ${whole}`;
}
