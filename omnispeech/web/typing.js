import { written } from "./elements.js";
import { Source } from "./source.js";

/** The field for a question in writing. Tells "asked" (text), and keeps it until `clear`. */
export class Typing extends Source {
  #field;

  constructor(form) {
    super();
    this.#field = form.elements.question;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
  }

  /** The text is on its way: it can be neither changed nor sent once more. */
  hold(held) {
    this.#field.readOnly = held;
  }

  clear() {
    this.#field.value = "";
  }

  #submit() {
    const text = written(this.#field);
    if (!text) this.#field.focus();
    else if (!this.#field.readOnly) this.emit("asked", text);
  }
}
