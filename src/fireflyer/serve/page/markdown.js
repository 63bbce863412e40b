// Markdown as the model writes it, into elements. What a model wrote is not to be trusted: its HTML is shown as text,
// the rest passes DOMPurify, images become links, and the page's Content-Security-Policy stands behind both.

import { copyButton, el } from "./dom.js";
import { FORMULAS, setFormulas } from "./formulas.js";
import { Marked } from "./vendor/marked.esm.js";

const CLEAN = {
  ALLOWED_TAGS: (
    "p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td a span"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});
marked.use({ extensions: FORMULAS });

/** One text that grows. Blocks that didn't change keep their elements, so selections and scroll positions stay. */
export class Markdown {
  #blocks = [];

  constructor(root) {
    this.root = root;
    root.classList.add("markdown");
  }

  /** Shows `text` instead of what was shown before. */
  show(text) {
    const tokens = marked.lexer(text);
    const links = tokens.links;
    const wanted = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    const referring = Object.keys(links).length > 0;
    let same = 0;
    while (!referring && same < wanted.length && this.#blocks[same]?.raw === wanted[same].raw) same++;
    for (const block of this.#blocks.splice(same)) block.node.remove();
    for (const token of wanted.slice(same)) {
      const node = rendered(Object.assign([token], { links }));
      this.#blocks.push({ raw: token.raw, node });
      this.root.append(node);
    }
  }
}

function rendered(tokens) {
  const node = el("div", { class: "block" });
  node.append(DOMPurify.sanitize(marked.parser(tokens), CLEAN));
  for (const code of node.querySelectorAll("pre > code")) frame(code);
  for (const table of node.querySelectorAll("table")) {
    const scroller = el("div", { class: "scroller", role: "region", "aria-label": "Table", tabindex: "0" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const link of node.querySelectorAll("a")) {
    if (!link.href) link.replaceWith(...link.childNodes);
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  setFormulas(node).catch(() => {});
  return node;
}

/** A code block with its language and a copy button above it. */
function frame(code) {
  const language = /^language-(\S+)/.exec(code.className)?.[1] ?? "";
  code.removeAttribute("class");
  const pre = code.parentElement;
  pre.tabIndex = 0;
  const button = copyButton("Copy code", () => code.textContent);
  const figure = el("figure", { class: "code" }, el("figcaption", {}, el("span", {}, language || "text"), button));
  pre.replaceWith(figure);
  figure.append(pre);
}
