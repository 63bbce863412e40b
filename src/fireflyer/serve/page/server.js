// Whether the server is there: a dot beside the model's name. Asked often while it isn't, seldom while it is.

import { readiness } from "./api.js";

const OFTEN_MS = 1500;
const SELDOM_MS = 20000;

/** `back` is called when the server is ready, at first and after each absence. */
export class ServerWatch {
  #timer = 0;
  #ready = false;

  constructor(back) {
    this.back = back;
    this.root = document.getElementById("server");
    this.text = document.getElementById("server-text");
    document.addEventListener("visibilitychange", () => !document.hidden && this.look());
    this.look();
  }

  get isReady() {
    return this.#ready;
  }

  /** Asks now, and from then on again and again while the page is seen. */
  async look() {
    clearTimeout(this.#timer);
    const state = await readiness();
    clearTimeout(this.#timer);
    const ready = state === "ready";
    this.root.dataset.state = ready ? "ready" : state === null ? "away" : "waiting";
    const said = ready ? "ready" : state === null ? "no server; waiting for it" : state;
    if (this.text.textContent !== said) this.text.textContent = said;
    const came = ready && !this.#ready;
    this.#ready = ready;
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), ready ? SELDOM_MS : OFTEN_MS);
    if (came) this.back();
  }
}
