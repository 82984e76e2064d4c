import { Call } from "./call.js";
import { showTimings } from "./chart.js";
import { Controls } from "./controls.js";
import { Conversation, heard } from "./conversation.js";
import { Devices } from "./devices.js";
import { save, soundOf } from "./files.js";
import { Levels } from "./levels.js";
import { Notices } from "./notices.js";
import { Replay } from "./replay.js";
import { Settings } from "./settings.js";
import { showStatus } from "./status.js";
import { Timings } from "./timings.js";
import { Transcript } from "./transcript.js";
import { Typing } from "./typing.js";

const FULL_WAIT_S = 15;
const UNSENT = "The file was not sent. Please send it again.";

const $ = (id) => document.getElementById(id);
const conversation = new Conversation();
const timings = new Timings();
const call = new Call(conversation, timings);
const settings = new Settings($("settings"));
const devices = new Devices(settings);
const notices = new Notices($("notices"));
const controls = new Controls($("talk"));
const typing = new Typing($("typing"));
const levels = new Levels();
const replay = new Replay();
const goOn = ["Go on", () => notices.clear()];
let deafness = null; // why there was no microphone

new Transcript($("transcript"), conversation, play);

const show = () => showStatus(call, settings.mode);

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
  if (call.wantsMicrophone && !window.isSecureContext) return notices.show("insecure");
  notices.clear();
  await call.start();
}

async function press() {
  replay.stop();
  if (settings.mode === "push" && call.hasMicrophone) return call.press();
  controls.reset(); // nothing to hold here
  if (call.hasMicrophone) return call.mute(!call.muted);
  call.wantsMicrophone = true;
  if (call.state === "idle") await start();
  else if (call.state === "open") await call.openMicrophone();
}

async function sendFile([file]) {
  $("file").value = "";
  if (!file) return;
  try {
    const pcm = await soundOf(file);
    if (!(await connected(window.isSecureContext))) throw new Error(UNSENT);
    await call.talk.send(pcm, file.name);
  } catch (error) {
    conversation.note(error.message);
  }
}

async function write(text) {
  replay.stop();
  typing.hold(true);
  const open = await connected(false);
  typing.hold(false);
  if (!open) return;
  typing.clear();
  await call.talk.write(text);
}

/** For what is to be sent. False: there is no session, and will be none. */
async function connected(withMicrophone) {
  if (call.state === "open") notices.clear();
  if (call.state === "idle") {
    call.wantsMicrophone = withMicrophone;
    await start();
  }
  return call.opened();
}

function begin(session, isNew) {
  settings.fit(session);
  if (!isNew) return;
  notices.clear();
  call.talk.configure(settings.session);
  if (call.wantsMicrophone) call.openMicrophone();
  else call.choose(settings.devices);
}

function applyMode(mode) {
  call.handsFree = mode !== "push";
  controls.reset();
  call.talk?.questions.forget();
  if (call.state === "open") call.talk.configure(settings.session);
  show();
}

function deaf(reason) {
  deafness = reason;
  const again = ["Try again", () => {
    notices.clear();
    call.openMicrophone();
  }];
  notices.show(reason, window.isSecureContext ? [again] : []);
}

function hears() {
  notices.withdraw(deafness);
  devices.refresh(); // they have names now
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
call.on("deaf", deaf);
call.on("microphone", hears);
call.on("replaced", () => notices.shown || notices.show("gone", [goOn], settings.microphone));
call.on("unrouted", (reason) => notices.show("loudspeaker", [goOn], reason));
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
devices.on("changed", (ids) => call.choose(ids));
devices.on("gone", (labels) => notices.shown || notices.show("gone", [goOn], labels));
devices.on("back", () => notices.withdraw("gone"));
typing.on("asked", write);
settings.on("changed", () => call.state === "open" && call.talk.configure(settings.session));
controls.on("press", press);
controls.on("release", () => settings.mode === "push" && call.release());
controls.on("escape", () => {
  if (document.body.hasAttribute("data-panel")) togglePanel(false);
  else call.talk?.interrupt();
});
timings.on("changed", () =>
  showTimings(timings.turns, { figure: $("chart"), summary: $("figures"), table: $("table") }),
);
$("interrupt").addEventListener("click", () => call.talk.interrupt());
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
call.choose(settings.devices);
devices.refresh();
if (!window.isSecureContext) notices.show("insecure");
