// How a message looks. A view is made once and told with `update` when its message changed.

import { canGoOn } from "./chat.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { InsideView } from "./inside.js";
import { Markdown } from "./markdown.js";

const CUT = { length: "Cut at the most tokens allowed.", stopped: "Stopped." };
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const percent = (share) => `${Math.round(share * 100)}%`;

/** A message of the reader's, with a place to edit it. `edited` is called with the new text. */
export class UserView {
  constructor(message, { edited }) {
    this.message = message;
    this.edited = edited;
    this.body = el("div", { class: "bubble" }, message.content);
    this.actions = el(
      "div",
      { class: "actions" },
      iconButton("edit", "Edit and send again", () => this.edit(), { class: "icon-button edit" }),
      copyButton("Copy message", () => message.content),
    );
    this.root = el("article", { class: "message user", "aria-label": "You" }, this.body, this.actions);
  }

  /** Turns the bubble into a field. */
  edit() {
    const field = el("textarea", { "aria-label": "Edit your message", rows: "3" });
    field.value = this.message.content;
    const close = () => {
      form.replaceWith(this.body, this.actions);
      this.actions.querySelector(".edit").focus();
    };
    const submit = (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) this.edited(text);
    };
    const form = el(
      "form",
      {
        class: "edit-form",
        on: {
          submit,
          keydown: (event) => {
            if (event.key === "Escape") {
              event.stopPropagation();
              close();
            } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
          },
        },
      },
      field,
      el("div", { class: "buttons" },
        el("button", { type: "button", class: "button", on: { click: close } }, "Cancel"),
        el("button", { type: "submit", class: "button primary" }, "Send"),
      ),
    );
    this.body.replaceWith(form);
    this.actions.remove();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  update() {}
}

/** The model's message. `does`: {regenerate, goOn, retry, openKey, giveResult(call, text)}. */
export class AnswerView {
  #inside = null;
  #calls = [];
  #failed = null;
  #offered = null;

  constructor(message, does, numExperts) {
    this.message = message;
    this.does = does;
    this.numExperts = numExperts;
    this.thought = new Markdown(el("div", { class: "thought" }));
    this.summary = el("span", {});
    this.thinking = el(
      "details",
      { class: "thinking", hidden: true },
      el("summary", {}, icon("think"), this.summary),
      this.thought.root,
    );
    this.text = message.plain ? null : new Markdown(el("div", { class: "text" }));
    this.body = this.text?.root ?? el("div", { class: "text plain" });
    this.waiting = el("div", { class: "waiting", role: "img", "aria-label": "Waiting for the first token" }, el("i"), el("i"), el("i"));
    this.cards = el("div", { class: "cards" });
    this.failure = el("div", { class: "failure", hidden: true });
    this.meter = el("span", { class: "meter" });
    this.buttons = el("span", { class: "actions" });
    this.foot = el("footer", {}, this.buttons, this.meter);
    this.root = el(
      "article",
      { class: "message assistant", "aria-label": message.model || "Model" },
      this.thinking, this.body, this.waiting, this.cards, this.failure, this.foot,
    );
  }

  /** `running`: it still grows. `last`: nothing follows it. `inside`: show tokens instead of set text. */
  update({ running, last, inside }) {
    const message = this.message;
    const tokens = inside && message.trace?.tokens.length > 0;
    this.root.setAttribute("aria-busy", running);
    this.root.classList.toggle("running", running);
    this.#think(running);
    if (!tokens) {
      if (this.text) this.text.show(message.content);
      else this.body.textContent = message.content;
    }
    this.body.hidden = tokens || !message.content;
    this.#look(tokens);
    this.waiting.hidden = !running || Boolean(message.content || message.reasoning || message.calls.length || tokens);
    this.#call(last && !running);
    this.#fail(running);
    this.meter.textContent = meterText(message, running);
    this.buttons.hidden = running || (message.error !== null && !message.content);
    if (!running) this.#offer(last);
  }

  #think(running) {
    const { reasoning, thinkingMs, content, calls } = this.message;
    this.thinking.hidden = !reasoning;
    if (!reasoning) return;
    const now = running && !content && calls.length === 0;
    if (now !== this.thinking.classList.contains("now")) {
      this.thinking.classList.toggle("now", now);
      this.thinking.open = now;
    }
    const seconds = ((thinkingMs ?? 0) / 1000).toFixed(1);
    this.summary.textContent = now ? `Thinking … ${seconds} s` : `Thought for ${seconds} s`;
    this.thought.show(reasoning);
  }

  #look(wanted) {
    if (wanted && !this.#inside) {
      this.#inside = new InsideView(this.numExperts);
      this.body.before(this.#inside.root);
    }
    if (wanted) this.#inside.show(this.message.trace);
    else this.#inside?.root.remove();
    if (!wanted) this.#inside = null;
  }

  #call(open) {
    this.message.calls.forEach((call, index) => {
      const card = (this.#calls[index] ??= this.#card(call));
      card.name.textContent = call.name;
      card.arguments.textContent = pretty(call.arguments);
      card.result.textContent = pretty(call.result ?? "");
      card.result.hidden = call.result === null;
      card.form.hidden = !open || call.result !== null || this.message.finish !== "tool_calls";
    });
  }

  #card(call) {
    const field = el("textarea", { rows: "2", "aria-label": "Result of this call", placeholder: "Its result, for the model to go on with" });
    const submit = (event) => {
      event.preventDefault();
      this.does.giveResult(call, field.value);
    };
    const card = {
      name: el("code", {}),
      arguments: el("pre", { role: "group", tabindex: "0", "aria-label": "Arguments" }),
      result: el("pre", { role: "group", class: "result", tabindex: "0", "aria-label": "Result" }),
      form: el("form", { on: { submit } }, field, el("button", { type: "submit", class: "button" }, "Give result")),
    };
    const head = el("header", {}, icon("tool"), "Calls ", card.name);
    this.cards.append(el("section", { class: "card" }, head, card.arguments, card.result, card.form));
    return card;
  }

  #fail(running) {
    const { error, finish } = this.message;
    const line = running ? null : (error?.message ?? CUT[finish] ?? null);
    this.failure.hidden = !line;
    if (line === this.#failed) return;
    this.#failed = line;
    const button = (text, click) => el("button", { type: "button", class: "button", on: { click } }, text);
    const offers = [];
    if (error?.status === 401) offers.push(button("Enter the key", () => this.does.openKey()));
    if (error) offers.push(patient(button("Retry", () => this.does.retry(this.message)), error.retryAt));
    else if (canGoOn(this.message)) offers.push(button("Go on", () => this.does.goOn(this.message)));
    this.failure.classList.toggle("error", Boolean(error));
    const said = el("span", { role: error ? "alert" : "note" }, line ?? "");
    this.failure.replaceChildren(error ? icon("warning") : "", said, ...offers);
  }

  #offer(last) {
    if (last === this.#offered) return;
    this.#offered = last;
    const offers = [copyButton("Copy answer", () => this.message.content || this.message.reasoning)];
    if (last) offers.push(iconButton("again", "Regenerate", () => this.does.regenerate(this.message)));
    this.buttons.replaceChildren(...offers);
  }
}

/** A button that can be pressed from the time `at` on; until then it counts the seconds. */
function patient(button, at) {
  const text = button.textContent;
  const tick = () => {
    const seconds = Math.ceil(((at ?? 0) - Date.now()) / 1000);
    button.disabled = seconds > 0;
    button.textContent = seconds > 0 ? `${text} in ${seconds} s` : text;
    if (seconds > 0) setTimeout(tick, 250);
  };
  tick();
  return button;
}

/** JSON with line breaks; what is none, as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function meterText({ stats }, running) {
  if (!stats.tokens) return "";
  const parts = [`${number(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`];
  if (stats.perSecond) parts.push(`${number(stats.perSecond)} tokens/s`);
  if (stats.guessed) parts.push(`${percent(stats.guessed / stats.tokens)} guessed by MTP`);
  if (stats.acceptance != null && !running) parts.push(`${percent(stats.acceptance)} accepted`);
  return parts.join(" · ");
}
