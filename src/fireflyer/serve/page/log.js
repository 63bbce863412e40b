// The messages of one conversation on the page, and where it is scrolled to.

import { AnswerView, UserView } from "./message.js";

const NEAR_PX = 60;

/** `does`: what messages' buttons do. */
export class Log {
  #views = [];
  #follows = true;
  #due = false;

  constructor(does) {
    this.does = does;
    this.root = document.getElementById("log");
    this.scroller = document.getElementById("scroller");
    this.toEnd = document.getElementById("to-end");
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.toEnd.addEventListener("click", () => this.follow());
    new ResizeObserver(() => (this.#follows ? this.#jump() : this.#scrolled())).observe(this.root);
  }

  /** Shows these messages. Views of messages that stay are kept. `state`: {running, inside, numExperts}. */
  show(messages, state) {
    let same = 0;
    while (same < messages.length && this.#views[same]?.message === messages[same]) same++;
    for (const view of this.#views.splice(same)) view.root.remove();
    for (const message of messages.slice(same)) {
      const view = this.#view(message, state);
      this.#views.push(view);
      this.root.append(view.root);
    }
    this.#views.forEach((view, place) => this.#update(view, place, state));
  }

  /** The message that grows has changed; drawn once a frame, and less often when drawing is slow. */
  grow(state) {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      const begun = performance.now();
      const view = this.#views.at(-1);
      if (view) this.#update(view, this.#views.length - 1, state());
      const spent = performance.now() - begun;
      setTimeout(() => (this.#due = false), 2 * spent);
    });
  }

  last(role) {
    return this.#views.findLast((view) => view.message.role === role);
  }

  /** To the end, and stay there while the answer grows. */
  follow() {
    this.#follows = true;
    this.#jump();
  }

  #view(message, { numExperts }) {
    if (message.role === "user") {
      return new UserView(message, { edited: (text) => this.does.edited(message, text) });
    }
    return new AnswerView(message, this.does, numExperts);
  }

  #update(view, place, { running, inside }) {
    view.update({ running: view.message === running, last: place === this.#views.length - 1, inside });
  }

  #jump() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #scrolled() {
    const below = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
    this.#follows = below < NEAR_PX;
    this.toEnd.hidden = this.#follows;
  }
}
