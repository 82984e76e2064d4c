/** What happens, in words and for the style: the state of the talk, and of its connection. */

const HINTS = {
  idle: "Press to start",
  connecting: "Connecting",
  asking: "Opening the microphone",
  deaf: "No microphone",
  typing: "Press to speak",
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

/** mode: "hands-free" or "push" */
export function showStatus(call, mode) {
  const now = state(call, mode);
  document.body.dataset.state = now;
  document.body.toggleAttribute("data-muted", call.muted);
  $("hint").textContent = HINTS[now] + (call.muted && now !== "muted" ? ", microphone off" : "");
  $("link").dataset.state = call.state;
  $("link").lastElementChild.textContent = LINKS[call.state];
  $("interrupt").disabled = !call.talk?.replies.busy;
  $("end").disabled = call.state === "idle";
  $("talk").setAttribute("aria-label", talkLabel(now, call, mode));
}

function state(call, mode) {
  if (call.state !== "open") return call.state;
  const { phase } = call.talk;
  if (phase === "hearing") return mode === "push" ? "recording" : "hearing";
  if (phase !== "listening") return phase;
  if (!call.hasMicrophone) return withoutMicrophone(call);
  if (mode === "push") return "ready";
  return call.muted ? "muted" : "listening";
}

function withoutMicrophone({ asking, wantsMicrophone }) {
  if (asking) return "asking";
  return wantsMicrophone ? "deaf" : "typing";
}

function talkLabel(now, call, mode) {
  if (now === "idle") return "Start the conversation";
  if (!call.hasMicrophone) return "Open the microphone";
  if (mode === "push") return now === "recording" ? "Send" : "Talk";
  return call.muted ? "Switch the microphone on" : "Switch the microphone off";
}
