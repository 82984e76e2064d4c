/** A list of devices in the settings, the default one first. What is chosen need not be there. */
export class DeviceChoice {
  #select;

  /** possible: this browser lets a page choose. */
  constructor(select, possible) {
    this.#select = select;
    select.parentElement.hidden = !possible;
  }

  /** Of the device to use; "": the default one. */
  get id() {
    return this.gone ? "" : this.#select.value;
  }

  /** The chosen device is not there. */
  get gone() {
    return this.#chosen.disabled;
  }

  get label() {
    return this.#chosen.dataset.label;
  }

  get kept() {
    return { id: this.#select.value, label: this.label };
  }

  restore({ id, label }) {
    if (!id) return;
    this.#select.append(option(id, label));
    this.#select.value = id;
  }

  /** devices: [{id, label}, ...] */
  offer(devices) {
    const { id, label } = this.kept;
    const options = devices.map((device) => option(device.id, device.label));
    if (id && !devices.some((device) => device.id === id)) options.push(absent(id, label));
    this.#select.replaceChildren(option("", "Default"), ...options);
    this.#select.value = id;
  }

  get #chosen() {
    return this.#select.selectedOptions[0];
  }
}

function option(id, label, text = label) {
  const made = new Option(text, id);
  made.dataset.label = label;
  return made;
}

function absent(id, label) {
  const made = option(id, label, `${label} (not connected)`);
  made.disabled = true;
  return made;
}
