// The settings dialog: reads and writes one settings object; the key goes its own way.

import { DEFAULTS } from "./store.js";

/** `changed(settings, key)` is called when something was changed and is valid. */
export class SettingsDialog {
  constructor(settings, key, changed) {
    this.dialog = document.getElementById("settings");
    this.form = this.dialog.querySelector("form");
    this.settings = settings;
    this.changed = changed;
    this.#fill(key);
    this.form.addEventListener("change", () => this.#read());
    this.form.querySelector("#set-key").addEventListener("input", () => this.#read());
    this.form.querySelector("#set-tools").addEventListener("input", (event) => this.#checkTools(event.target));
    this.dialog.querySelector("#settings-reset").addEventListener("click", () => {
      const { inside, model } = this.settings;
      Object.assign(this.settings, DEFAULTS, { inside, model });
      this.#fill(this.form.elements.key.value);
      this.changed(this.settings, this.form.elements.key.value);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  /** Opens it; `field` names what gets the focus. */
  open(field = null) {
    this.dialog.showModal();
    if (field) this.form.elements[field].focus();
  }

  /** The models to choose from. */
  offer(cards) {
    const select = this.form.elements.model;
    select.replaceChildren(...cards.map((card) => new Option(card.id, card.id)));
    select.value = this.settings.model;
  }

  #fill(key) {
    for (const [name, value] of Object.entries(this.settings)) {
      const field = this.form.elements[name];
      if (field) field.value = value;
    }
    this.form.elements.key.value = key;
  }

  #checkTools(field) {
    field.setCustomValidity(isToolList(field.value) ? "" : "A JSON list of tools, as in OpenAI's API");
  }

  #read() {
    this.#checkTools(this.form.elements.tools);
    for (const name of Object.keys(this.settings)) {
      const field = this.form.elements[name];
      if (field?.value !== undefined && field.checkValidity()) this.settings[name] = field.value;
    }
    this.form.reportValidity();
    this.changed(this.settings, this.form.elements.key.value.trim());
  }
}

function isToolList(text) {
  if (!text.trim()) return true;
  try {
    return Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}
