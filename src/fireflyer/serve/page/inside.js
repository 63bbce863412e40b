// Look inside an answer: its tokens, tinted where MTP had guessed them, and which experts answered each of them.

import { el } from "./dom.js";

const CELL = { width: [2, 44], height: [4, 22], mapHeight: 300 };
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

const clamp = (value, [least, most]) => Math.min(Math.max(value, least), most);

/** `numExperts`: per layer, 0 where the server doesn't say; then what was seen tells. */
export class InsideView {
  #trace = { tokens: [], drafted: [], experts: [] };
  #shown = 0;
  #selected = null;
  #hovered = null;
  #experts;

  constructor(numExperts) {
    this.#experts = new ExpertMap(numExperts);
    this.tokens = el("div", {
      class: "tokens",
      role: "listbox",
      "aria-orientation": "horizontal",
      "aria-label": "Tokens of the answer; arrow keys go through them",
      on: {
        keydown: (event) => this.#move(event),
        click: (event) => this.#pick(event.target),
        focusin: (event) => this.#pick(event.target),
        pointerover: (event) => this.#hover(event.target),
        pointerleave: () => this.#hover(null),
      },
    });
    this.caption = el("p", { class: "token-caption", "aria-live": "polite" });
    this.root = el(
      "div",
      { class: "inside" },
      this.tokens,
      el("div", { class: "experts" }, this.caption, this.#experts.root, legend()),
    );
  }

  /** The answer's trace, which only grows from one call to the next. */
  show(trace) {
    this.#trace = trace;
    const fresh = document.createDocumentFragment();
    for (; this.#shown < trace.tokens.length; this.#shown++) {
      fresh.append(this.#token(this.#shown));
      this.#experts.add(trace.experts[this.#shown]);
    }
    this.tokens.append(fresh);
    this.#describe();
  }

  #token(place) {
    const text = this.#trace.tokens[place];
    const guessed = this.#trace.drafted[place];
    const special = /^<[|｜].*[|｜]>$/.test(text) || text === "<think>" || text === "</think>";
    return el(
      "span",
      {
        role: "option",
        class: `token${guessed ? " guessed" : ""}${special ? " special" : ""}`,
        tabindex: place === 0 ? "0" : "-1",
        "aria-selected": "false",
        "aria-label": text.trim() === "" && readable(text),
        "aria-description": guessed && "guessed by MTP",
        "data-place": place,
      },
      special ? plain(text) : text.replaceAll("\n", "⏎\n"),
    );
  }

  #pick(target) {
    const token = target.closest?.(".token");
    if (!token || Number(token.dataset.place) === this.#selected) return;
    for (const each of this.tokens.querySelectorAll('[aria-selected="true"], [tabindex="0"]')) {
      each.setAttribute("aria-selected", "false");
      each.tabIndex = -1;
    }
    token.setAttribute("aria-selected", "true");
    token.tabIndex = 0;
    this.#selected = Number(token.dataset.place);
    this.#hovered = null;
    this.#describe();
  }

  #hover(target) {
    const token = target?.closest?.(".token");
    const place = token ? Number(token.dataset.place) : null;
    if (place === this.#hovered) return;
    this.#hovered = place;
    this.#describe();
  }

  #move(event) {
    const last = this.#shown - 1;
    const from = this.#selected ?? 0;
    const to = { Home: 0, End: last }[event.key] ?? (event.key in STEPS ? from + STEPS[event.key] : null);
    if (to === null || last < 0) return;
    event.preventDefault();
    this.tokens.children[clamp(to, [0, last])].focus();
  }

  #describe() {
    const place = this.#hovered ?? this.#selected;
    const { tokens, drafted, experts } = this.#trace;
    if (place === null) {
      const guessed = drafted.reduce((sum, each) => sum + each, 0);
      const hint = "Point at a token, tap it or use the arrow keys.";
      this.caption.replaceChildren(`${tokens.length} tokens, ${guessed} of them guessed by MTP. ${hint}`);
    } else {
      const how = drafted[place] ? "MTP had guessed it" : "MTP had not guessed it";
      const name = el("code", {}, readable(plain(tokens[place])));
      this.caption.replaceChildren(`Token ${place + 1} of ${tokens.length}: `, name, `, ${how}.`);
    }
    this.#experts.show(place === null ? null : experts[place]);
  }
}

/** The special tokens' wide bars and low lines, which few monospaced fonts have, in ASCII. */
function plain(text) {
  return text.replaceAll("｜", "|").replaceAll("▁", "_");
}

function readable(text) {
  return text.trim() === "" || text.includes("\n") ? JSON.stringify(text) : text;
}

function legend() {
  const sample = (kind, text) => [el("span", { class: `sample ${kind}`, "aria-hidden": "true" }), text];
  return el(
    "p",
    { class: "legend" },
    el("span", {}, ...sample("guessed", "guessed by MTP")),
    el("span", {}, ...sample("heat", "experts over the whole answer")),
    el("span", {}, ...sample("chosen", "experts of this token")),
  );
}

/** A heat map: a row for each MoE layer, a column for each expert. */
class ExpertMap {
  #counts = [];
  #busiest = 0;
  #numTokens = 0;
  #numExperts;
  #chosen = null;
  #size = { width: 0, height: 0 };

  constructor(numExperts) {
    this.#numExperts = numExperts;
    this.canvas = el("canvas", { class: "heat-map", role: "img" });
    this.missing = el(
      "p",
      { class: "hint" },
      "Which experts answered wasn't recorded here. Answers written while “Look inside” is on show it.",
    );
    this.pointed = el("p", { class: "hint", "aria-hidden": "true" });
    this.list = el("ol", {});
    this.words = el("details", { class: "in-words" }, el("summary", {}, "In words"), this.list);
    this.words.addEventListener("toggle", () => this.#say());
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => (this.pointed.textContent = this.#shape()));
    this.root = el("div", { class: "expert-map" }, this.canvas, this.pointed, this.words, this.missing);
    new ResizeObserver(() => this.draw()).observe(this.root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** One token's experts, per layer; null where they weren't recorded. */
  add(layers) {
    if (!layers) return;
    this.#numTokens++;
    layers.forEach((chosen, layer) => {
      const counts = (this.#counts[layer] ??= []);
      for (const expert of chosen) {
        counts[expert] = (counts[expert] ?? 0) + 1;
        this.#busiest = Math.max(this.#busiest, counts[expert]);
        this.#numExperts = Math.max(this.#numExperts, expert + 1);
      }
    });
  }

  /** Marks one token's experts; null for none. */
  show(chosen) {
    this.#chosen = chosen;
    const any = this.#numTokens > 0;
    this.missing.hidden = any;
    this.canvas.hidden = this.pointed.hidden = !any;
    this.words.hidden = !chosen;
    if (!any) return;
    this.pointed.textContent = this.#shape();
    this.canvas.setAttribute("aria-label", `Experts that answered: ${this.#shape()}`);
    this.#say();
    this.draw();
  }

  #shape() {
    return `${this.#counts.length} MoE layers, each of ${this.#numExperts} experts`;
  }

  #say() {
    if (!this.#chosen || !this.words.open) return;
    const lines = this.#chosen.map((experts, layer) => `layer ${layer + 1}: ${[...experts].sort((a, b) => a - b).join(", ")}`);
    this.list.replaceChildren(...lines.map((line) => el("li", {}, line)));
  }

  #point(event) {
    const layer = Math.floor((event.offsetY / this.#size.height) * this.#counts.length);
    const expert = Math.floor((event.offsetX / this.#size.width) * this.#numExperts);
    const count = this.#counts[layer]?.[expert] ?? 0;
    this.pointed.textContent = `layer ${layer + 1}, expert ${expert}: answered ${count} of ${this.#numTokens} tokens`;
  }

  draw() {
    const layers = this.#counts.length;
    if (layers === 0 || this.root.clientWidth === 0) return;
    const cell = {
      width: clamp(this.root.clientWidth / this.#numExperts, CELL.width),
      height: clamp(CELL.mapHeight / layers, CELL.height),
    };
    const size = { width: cell.width * this.#numExperts, height: cell.height * layers };
    const scale = devicePixelRatio;
    this.#size = size;
    this.canvas.width = Math.round(size.width * scale);
    this.canvas.height = Math.round(size.height * scale);
    this.canvas.style.width = `${size.width}px`;
    this.canvas.style.height = `${size.height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.root);
    const paint = (layer, expert, colour, alpha) => {
      const gap = cell.width > 5 ? 1.5 : cell.width > 3 ? 0.5 : 0;
      context.globalAlpha = alpha;
      context.fillStyle = colour;
      context.fillRect(expert * cell.width, layer * cell.height, cell.width - gap, cell.height - Math.max(gap, 0.5));
    };
    const colours = ["--cell", "--heat", "--chosen"].map((name) => style.getPropertyValue(name));
    for (let layer = 0; layer < layers; layer++) {
      for (let expert = 0; expert < this.#numExperts; expert++) {
        const share = (this.#counts[layer][expert] ?? 0) / this.#busiest;
        paint(layer, expert, colours[0], 1);
        if (share > 0) paint(layer, expert, colours[1], (this.#chosen ? 0.5 : 0.9) * share);
      }
      for (const expert of this.#chosen?.[layer] ?? []) paint(layer, expert, colours[2], 1);
    }
  }
}
