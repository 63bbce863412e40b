// Formulas in Markdown: $...$, $$...$$, \(...\), \[...\] and a bare \boxed{...}, set as MathML by Temml.

import { el } from "./dom.js";

// A dollar opens only before, and closes only after, something that is no space; "$5 and $6" holds no formula.
const INLINE = [
  [/^\$\$((?:[^$\\]|\\[^])+?)\$\$/, true],
  [/^\$((?!\s)(?:[^$\\\n]|\\[^\n])*?(?:[^\s$\\]|\\[^\s]))\$(?!\d)/, false],
  [/^\\\(([^]+?)\\\)/, false],
  [/^\\\[([^]+?)\\\]/, true],
];
const BLOCK = /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[^\S\n]*(?:\n|$)/;
const OPENING = /\$|\\[([]|\\boxed\{/;

function inline(source) {
  for (const [pattern, display] of INLINE) {
    const found = pattern.exec(source);
    if (found) return { type: "formula", raw: found[0], tex: found[1], display };
  }
  const raw = boxed(source);
  return raw && { type: "formula", raw, tex: raw, display: false };
}

function boxed(source) {
  if (!source.startsWith("\\boxed{")) return undefined;
  let depth = 0;
  for (let at = 6; at < source.length; at++) {
    if (source[at] === "\\") at++;
    else if (source[at] === "{") depth++;
    else if (source[at] === "}" && --depth === 0) return source.slice(0, at + 1);
  }
  return undefined;
}

function start(source) {
  const found = OPENING.exec(source);
  return found ? found.index : undefined;
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/** For marked. The formula's source becomes the text of span.formula, which `setFormulas` replaces. */
export const FORMULAS = [
  {
    name: "formulaBlock",
    level: "block",
    start: (source) => source.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
    tokenizer(source) {
      const found = BLOCK.exec(source);
      return found ? { type: "formulaBlock", raw: found[0], tex: found[1] ?? found[2] } : undefined;
    },
    renderer: ({ tex }) => `<p><span class="formula display">${escaped(tex)}</span></p>`,
  },
  {
    name: "formula",
    level: "inline",
    start,
    tokenizer: inline,
    renderer: ({ tex, display }) => `<span class="formula${display ? " display" : ""}">${escaped(tex)}</span>`,
  },
];

let library = null;

/** Temml is fetched when the first formula appears. */
function temml() {
  library ??= new Promise((resolve, reject) => {
    const loaded = () => resolve(globalThis.temml);
    document.head.append(
      el("link", { rel: "stylesheet", href: "vendor/Temml-Local.css" }),
      el("script", { src: "vendor/temml.min.js", on: { load: loaded, error: reject } }),
    );
  });
  return library;
}

/** Sets every formula below `root`; what is no formula stays as it was written. */
export async function setFormulas(root) {
  const places = [...root.querySelectorAll("span.formula")];
  if (places.length === 0) return;
  const { render } = globalThis.temml ?? (await temml());
  for (const place of places) {
    const tex = place.textContent;
    const display = place.classList.contains("display");
    try {
      // trust: false refuses links, images, classes and styles; the limits stop endless macros and huge rules.
      render(tex, place, { displayMode: display, trust: false, throwOnError: true, maxExpand: 200, maxSize: [20, 100] });
      place.title = tex;
    } catch {
      place.replaceChildren(el("code", {}, tex));
    }
  }
}
