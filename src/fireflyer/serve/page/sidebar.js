// The list of conversations, a drawer on narrow screens; and the question before something is deleted.

import { el, iconButton } from "./dom.js";

const narrow = matchMedia("(max-width: 899px)");

/** `does`: {open(conversation), remove(conversation), clear(), fresh()}. */
export class Sidebar {
  constructor(does) {
    this.does = does;
    this.root = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.opener = document.getElementById("open-sidebar");
    this.veil = document.getElementById("veil");
    this.opener.addEventListener("click", () => this.toggle(!this.isOpen));
    document.getElementById("close-sidebar").addEventListener("click", () => this.toggle(false));
    this.veil.addEventListener("click", () => this.toggle(false));
    this.root.addEventListener("keydown", (event) => event.key === "Escape" && narrow.matches && this.toggle(false));
    document.getElementById("new-chat").addEventListener("click", () => {
      does.fresh();
      this.leave();
    });
    document.getElementById("clear-all").addEventListener("click", async () => {
      if (await confirmed("Delete all conversations of this browser?")) does.clear();
    });
    narrow.addEventListener("change", () => this.toggle(!narrow.matches, false));
    this.toggle(!narrow.matches, false);
  }

  get isOpen() {
    return document.body.classList.contains("sidebar-open");
  }

  toggle(open, focus = true) {
    document.body.classList.toggle("sidebar-open", open);
    this.opener.setAttribute("aria-expanded", open);
    this.root.inert = !open;
    this.veil.hidden = !open || !narrow.matches;
    if (focus) (open ? document.getElementById("new-chat") : this.opener).focus();
  }

  /** After a choice the drawer makes room for what was chosen. */
  leave() {
    if (narrow.matches) this.toggle(false, false);
  }

  show(conversations, current) {
    this.list.replaceChildren(...conversations.map((each) => this.#item(each, each.id === current.id)));
    document.getElementById("clear-all").hidden = conversations.length === 0;
    document.getElementById("no-conversations").hidden = conversations.length > 0;
  }

  #item(conversation, current) {
    const title = conversation.title || "New chat";
    const open = () => {
      this.does.open(conversation);
      this.leave();
    };
    const remove = async () => {
      if (await confirmed(`Delete “${title}”?`)) this.does.remove(conversation);
    };
    return el(
      "li",
      { class: current ? "current" : "" },
      el("button", { type: "button", class: "title", title, "aria-current": current && "true", on: { click: open } }, title),
      iconButton("trash", `Delete “${title}”`, remove),
    );
  }
}

/** Whether the reader agrees. */
function confirmed(question) {
  const dialog = document.getElementById("confirm");
  document.getElementById("confirm-text").textContent = question;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
