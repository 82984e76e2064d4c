import { DeviceChoice } from "./device-choice.js";
import { written } from "./elements.js";
import { Source } from "./source.js";

const KEPT_AS = "omnispeech.settings";

/**
 * The form of settings, kept by the browser. Tells "changed", "mode" (hands-free or push), and
 * "device" when another microphone or loudspeaker is chosen.
 */
export class Settings extends Source {
  #form;
  #devices; // {microphone, loudspeaker}

  constructor(form) {
    super();
    this.#form = form;
    const { microphone, loudspeaker } = form.elements;
    const microphones = Boolean(navigator.mediaDevices);
    form.querySelector("#devices-note").hidden = !microphones;
    this.#devices = {
      microphone: new DeviceChoice(microphone, microphones),
      loudspeaker: new DeviceChoice(loudspeaker, "setSinkId" in AudioContext.prototype),
    };
    this.#restore();
    this.#showValues();
    for (const field of form.elements) {
      field.addEventListener("input", () => this.#showValues());
      field.addEventListener("change", () => this.#changed(field));
    }
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  get mode() {
    return this.#form.elements.mode.value;
  }

  set mode(mode) {
    this.#form.elements.mode.value = mode;
    this.#keep();
    this.emit("mode", mode);
  }

  /** As session.update wants them. */
  get session() {
    const field = (name) => this.#form.elements[name];
    const input = { turn_detection: this.mode === "push" ? null : this.#detection() };
    if (!field("transcription").disabled) {
      input.transcription = field("transcription").checked ? { model: "omnispeech" } : null;
    }
    return {
      instructions: written(field("instructions")),
      output_modalities: [field("modality").value],
      max_output_tokens: Number(field("tokens").value),
      temperature: Number(field("temperature").value),
      audio: { input, output: { voice: field("voice").value } },
    };
  }

  /** Ids of the devices to use; "": the default one. */
  get devices() {
    const { microphone, loudspeaker } = this.#devices;
    return { microphone: microphone.id, loudspeaker: loudspeaker.id };
  }

  /** Label of the chosen microphone. */
  get microphone() {
    return this.#devices.microphone.label;
  }

  /** Labels of devices that were chosen and are not there. */
  get gone() {
    return Object.values(this.#devices)
      .filter((choice) => choice.gone)
      .map((choice) => choice.label);
  }

  /** found: {microphone: [{id, label}, ...], loudspeaker: likewise} */
  offer(found) {
    for (const [name, choice] of Object.entries(this.#devices)) choice.offer(found[name]);
    this.#form.querySelector("#devices-note").hidden = true;
  }

  /** What the server says of itself: its voice, and what it cannot do. */
  fit({ audio, unsupported = {} }) {
    const { voice, transcription } = this.#form.elements;
    if (![...voice.options].some((option) => option.value === audio.output.voice)) {
      voice.replaceChildren(new Option(audio.output.voice));
    }
    voice.value = audio.output.voice;
    transcription.disabled = "audio.input.transcription" in unsupported;
    if (transcription.disabled) transcription.checked = false;
    this.#form.querySelector("#transcription-note").hidden = !transcription.disabled;
  }

  #detection() {
    const field = (name) => Number(this.#form.elements[name].value);
    return {
      type: "server_vad",
      threshold: field("threshold"),
      silence_duration_ms: field("silence"),
    };
  }

  #changed(target) {
    this.#keep();
    if (target.name === "mode") this.emit("mode", this.mode);
    else if (target.name in this.#devices) this.emit("device");
    else this.emit("changed");
  }

  #showValues() {
    for (const output of this.#form.querySelectorAll("output")) {
      const input = this.#form.elements[output.htmlFor[0]];
      output.value = `${input.value}${output.dataset.unit ?? ""}`;
    }
  }

  #keep() {
    const values = Object.fromEntries(new FormData(this.#form));
    for (const [name, { kept }] of Object.entries(this.#devices)) values[name] = kept;
    try {
      localStorage.setItem(KEPT_AS, JSON.stringify(values));
    } catch {
      // storage is full or forbidden: the settings hold until the page is left
    }
  }

  #restore() {
    for (const [name, value] of Object.entries(kept())) {
      const field = this.#form.elements[name];
      if (name in this.#devices) this.#devices[name].restore(value);
      else if (field?.type === "checkbox") field.checked = true;
      else if (field && name !== "voice") field.value = value; // the server names its voices
    }
  }
}

/** What was set when the page was here last; nothing if that cannot be read. */
function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT_AS)) ?? {};
  } catch {
    return {};
  }
}
