import { Source } from "./source.js";

/**
 * The sound devices of this machine, for the settings. Browsers name them once the microphone has
 * been allowed.
 *
 * Tells "changed" {microphone, loudspeaker} (the ids to use), "gone" (labels of chosen devices
 * that are not there any more) and "back" once none is missing.
 */
export class Devices extends Source {
  #devices = navigator.mediaDevices; // none where browsers allow no microphone
  #settings;
  #list; // as last asked for
  #gone = ""; // as told

  constructor(settings) {
    super();
    this.#settings = settings;
    settings.on("device", () => this.#tell());
    this.#devices?.addEventListener("devicechange", () => this.refresh());
  }

  async refresh() {
    const list = this.#devices?.enumerateDevices?.();
    this.#list = list;
    const found = (await list) ?? [];
    if (list !== this.#list) return; // a newer one was asked for
    if (found.length && !found.some(({ deviceId }) => deviceId)) return; // there, without names
    const microphone = of(found, "audioinput");
    this.#settings.offer({ microphone, loudspeaker: of(found, "audiooutput") });
    this.#tell();
  }

  #tell() {
    this.emit("changed", this.#settings.devices);
    const gone = this.#settings.gone.join(", ");
    if (gone === this.#gone) return;
    this.#gone = gone;
    this.emit(gone ? "gone" : "back", gone);
  }
}

/** Without the one that stands for the default: the list has that already. */
const of = (found, wanted) =>
  found
    .filter(({ kind, deviceId }) => kind === wanted && deviceId && deviceId !== "default")
    .map(({ deviceId, label }) => ({ id: deviceId, label }));
