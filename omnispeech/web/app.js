import { Call } from "./call.js";
import { showTimings } from "./chart.js";
import { Controls } from "./controls.js";
import { Conversation, heard } from "./conversation.js";
import { save, soundOf } from "./files.js";
import { Levels } from "./levels.js";
import { Notices } from "./notices.js";
import { Replay } from "./replay.js";
import { Settings } from "./settings.js";
import { Timings } from "./timings.js";
import { Transcript } from "./transcript.js";

const FULL_WAIT_S = 15;
const HINTS = {
  idle: "Press to start",
  connecting: "Connecting",
  asking: "Opening the microphone",
  deaf: "No microphone",
  muted: "Microphone off",
  listening: "Listening",
  ready: "Hold to talk",
  hearing: "Hearing you",
  recording: "Let go to send",
  thinking: "Thinking",
  answering: "Speaking",
};
const LINKS = { idle: "Not connected", connecting: "Connecting", open: "Connected" };

const $ = (id) => document.getElementById(id);
const conversation = new Conversation();
const timings = new Timings();
const call = new Call(conversation, timings);
const settings = new Settings($("settings"));
const notices = new Notices($("notices"));
const controls = new Controls($("talk"));
const levels = new Levels();
const replay = new Replay();

new Transcript($("transcript"), conversation, play);

function state() {
  if (call.state !== "open") return call.state;
  const { phase } = call.talk;
  if (phase === "hearing") return settings.mode === "push" ? "recording" : "hearing";
  if (phase !== "listening") return phase;
  if (!call.hasMicrophone) return call.asking ? "asking" : "deaf";
  if (settings.mode === "push") return "ready";
  return call.muted ? "muted" : "listening";
}

function show() {
  const now = state();
  document.body.dataset.state = now;
  document.body.toggleAttribute("data-muted", call.muted);
  $("hint").textContent = HINTS[now] + (call.muted && now !== "muted" ? ", microphone off" : "");
  $("link").dataset.state = call.state;
  $("link").lastElementChild.textContent = LINKS[call.state];
  $("interrupt").disabled = !call.talk?.replies.busy;
  $("end").disabled = call.state === "idle";
  $("talk").setAttribute("aria-label", talkLabel(now));
}

function talkLabel(now) {
  if (now === "idle") return "Start the conversation";
  if (settings.mode === "push") return now === "recording" ? "Send" : "Talk";
  return call.muted ? "Switch the microphone on" : "Switch the microphone off";
}

function showEntries() {
  const empty = conversation.entries.length === 0;
  $("welcome").hidden = !empty;
  $("save-text").disabled = empty;
  $("save-sound").disabled = !conversation.entries.some(({ pieces }) => pieces.length);
}

async function play(entry) {
  await call.prepareSound();
  replay.toggle(call.context, entry, heard(entry));
}

async function start() {
  if (!window.isSecureContext) return notices.show("insecure");
  notices.clear();
  await call.start();
}

async function press() {
  replay.stop();
  if (settings.mode === "push" && call.hasMicrophone) return call.press();
  controls.reset(); // nothing to hold here
  if (call.state === "idle") await start();
  else if (call.hasMicrophone) call.mute(!call.muted);
  else if (call.state === "open") await call.openMicrophone();
}

async function sendFile([file]) {
  $("file").value = "";
  if (!file) return;
  try {
    const pcm = await soundOf(file);
    await start();
    await opened();
    await call.talk.askWith(pcm, file.name);
  } catch (error) {
    conversation.note(error.message);
  }
}

/** Until there is a session; fails if there will be none. */
function opened() {
  if (call.state === "open") return Promise.resolve();
  return new Promise((resolve, reject) => {
    call.on("session", ({ isNew }) => isNew && resolve());
    call.on("closed", () => reject(new Error("The file was not sent. Please send it again.")));
  });
}

function begin(session, isNew) {
  settings.fit(session);
  if (!isNew) return;
  notices.clear();
  call.talk.configure(settings.session);
  call.openMicrophone();
}

function applyMode(mode) {
  call.handsFree = mode !== "push";
  controls.reset();
  call.talk?.questions.forget();
  if (call.state === "open") call.talk.configure(settings.session);
  show();
}

function troubled({ message, param }) {
  if (!param?.startsWith("session.audio.input.turn_detection")) return conversation.note(message);
  if (settings.mode === "push") return; // it has been said
  conversation.note(`Hands-free is not to be had here, push to talk is: ${message}`);
  settings.mode = "push";
}

function closed({ kind, reason }) {
  if (kind === "key") notices.askKey((key) => unlock(key), reason);
  else notices.show(kind, [["Try again", start]], reason);
  if (kind === "full") notices.countDown(FULL_WAIT_S, start);
}

async function unlock(key) {
  notices.clear();
  await call.unlock(key);
}

function togglePanel(open = !document.body.hasAttribute("data-panel")) {
  document.body.toggleAttribute("data-panel", open);
  $("panel").setAttribute("aria-expanded", String(open));
}

call.on("changed", show);
call.on("session", ({ session, isNew }) => begin(session, isNew));
call.on("trouble", troubled);
call.on("closed", closed);
call.on("resumed", () => notices.clear());
call.on("deaf", (reason) => notices.show(reason, [["Try again", () => {
  notices.clear();
  call.openMicrophone();
}]]));
call.on("lost", ({ waitS, known }) => {
  notices.show(known ? "lost" : "connecting", [["Try now", () => call.tryNow()]]);
  notices.countDown(waitS);
  show();
});
call.on("short", () => conversation.note("Hold the button while you speak, then let go."));
call.on("heard", (level) => levels.show([$("heard"), $("talk")], level));
call.on("played", (level) => levels.show([$("played")], level));
conversation.on("added", showEntries).on("changed", showEntries).on("removed", showEntries);
settings.on("mode", applyMode);
settings.on("changed", () => call.state === "open" && call.talk.configure(settings.session));
controls.on("press", press);
controls.on("release", () => settings.mode === "push" && call.release());
controls.on("escape", () => {
  if (document.body.hasAttribute("data-panel")) togglePanel(false);
  else call.talk?.replies.interrupt();
});
timings.on("changed", () =>
  showTimings(timings.turns, { figure: $("chart"), summary: $("figures"), table: $("table") }),
);
$("interrupt").addEventListener("click", () => call.talk.replies.interrupt());
$("end").addEventListener("click", () => {
  notices.clear();
  call.end();
});
$("file").addEventListener("change", ({ target }) => sendFile(target.files));
$("send-file").addEventListener("click", () => $("file").click());
$("save-text").addEventListener("click", () =>
  save(new Blob([conversation.asText()], { type: "text/plain" }), "conversation.txt"),
);
$("save-sound").addEventListener("click", () => save(conversation.asWav(), "conversation.wav"));
$("panel").addEventListener("click", () => togglePanel());
window.addEventListener("pagehide", () => call.end()); // nobody comes back to this conversation
$("close-panel").addEventListener("click", () => togglePanel(false));

call.handsFree = settings.mode !== "push";
showTimings([], { figure: $("chart"), summary: $("figures"), table: $("table") });
showEntries();
show();
if (!window.isSecureContext) notices.show("insecure");
