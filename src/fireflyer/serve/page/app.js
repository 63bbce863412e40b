// The page: one conversation is shown, at most one answer is being written, and everything is saved as it happens.

import { models } from "./api.js";
import { ask, modeOf, newAnswer, requestFor } from "./chat.js";
import { say } from "./dom.js";
import { Log } from "./log.js";
import { ServerWatch } from "./server.js";
import { SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";

const SAVE_MS = 1000;
const SAID_AT_MOST = 1500;
const hovers = matchMedia("(hover: hover)"); // elsewhere the focus would bring up a keyboard
const byId = (id) => document.getElementById(id);

class App {
  settings = store.loadSettings();
  key = store.loadKey();
  conversations = store.loadConversations();
  current = this.conversations[0] ?? store.newConversation();
  cards = [];
  /** What is being written: {conversation, answer, controller}, or null. */
  running = null;

  constructor() {
    this.prompt = byId("prompt");
    this.sidebar = new Sidebar({
      open: (conversation) => this.open(conversation),
      remove: (conversation) => this.remove([conversation]),
      clear: () => this.remove([...this.conversations]),
      fresh: () => this.open(store.newConversation()),
    });
    this.log = new Log({
      edited: (message, text) => this.edited(message, text),
      regenerate: (answer) => this.regenerate(answer),
      retry: (answer) => this.regenerate(answer),
      goOn: (answer) => this.write(answer),
      openKey: () => this.dialog.open("key"),
      giveResult: (call, text) => this.giveResult(call, text),
    });
    this.dialog = new SettingsDialog(this.settings, this.key, (settings, key) => this.changed(key));
    this.server = new ServerWatch(() => this.connect());
    this.#listen();
    this.#paint();
    this.open(this.current);
    store.watch(() => this.reload());
  }

  get card() {
    return this.cards.find((each) => each.id === this.settings.model) ?? null;
  }

  get mode() {
    return modeOf(this.settings, this.card);
  }

  /** The models, once the server is there or the key has changed. */
  async connect() {
    try {
      this.cards = await models(this.key);
    } catch (error) {
      if (error.status !== 401) return; // asking will say why
      this.cards = [];
    }
    if (this.cards.length && !this.card) this.settings.model = this.cards[0].id;
    this.dialog.offer(this.cards);
    this.show();
  }

  changed(key) {
    store.saveSettings(this.settings);
    if (key !== this.key) {
      this.key = key;
      store.saveKey(key);
      this.connect();
    }
    this.#paint();
    this.show();
  }

  open(conversation) {
    this.current = conversation;
    this.show();
    this.log.follow();
    if (hovers.matches) this.prompt.focus();
  }

  remove(conversations) {
    for (const each of conversations) {
      if (this.running?.conversation === each) this.stop();
      store.deleteConversation(each.id);
    }
    this.conversations = this.conversations.filter((each) => !conversations.includes(each));
    this.open(conversations.includes(this.current) ? (this.conversations[0] ?? store.newConversation()) : this.current);
  }

  /** Another tab changed what is stored; what is written here stays. */
  reload() {
    if (this.running) return;
    this.conversations = store.loadConversations();
    this.current = this.conversations.find((each) => each.id === this.current.id) ?? store.newConversation();
    this.show();
  }

  /** How to ask depends on the model, so it has to be known. */
  async send(text) {
    if (!this.card) await this.connect();
    if (this.running || !text.trim()) return;
    this.current.messages.push({ role: "user", content: text });
    this.current.title ||= text.trim().split("\n")[0].slice(0, 80);
    this.write(this.#begin());
  }

  edited(message, text) {
    this.stop();
    const place = this.current.messages.indexOf(message);
    if (place === 0) this.current.title = "";
    this.current.messages.splice(place);
    this.send(text);
  }

  regenerate(answer) {
    this.stop();
    const place = this.current.messages.indexOf(answer);
    this.current.messages.splice(place);
    this.write(this.#begin());
  }

  /** When the last of an answer's calls has its result, the model goes on. */
  giveResult(call, text) {
    call.result = text;
    if (this.current.messages.at(-1).calls.every((each) => each.result !== null)) this.write(this.#begin());
    else this.save(this.current);
    this.show();
  }

  #begin() {
    const answer = newAnswer(this.mode, this.settings.model);
    this.current.messages.push(answer);
    return answer;
  }

  /** Lets the model write `answer`, the last message of the current conversation. */
  async write(answer) {
    const conversation = this.current;
    const history = conversation.messages.slice(0, conversation.messages.indexOf(answer));
    const run = { conversation, answer, controller: new AbortController() };
    this.running = run;
    this.save(conversation);
    this.show();
    this.log.follow();
    say("Answering");
    let savedAt = performance.now();
    const news = () => {
      if (this.current === conversation) this.log.grow(() => this.#state());
      if (performance.now() - savedAt > SAVE_MS) {
        savedAt = performance.now();
        store.saveConversation(conversation);
      }
    };
    try {
      await ask(answer, requestFor(answer, history, this.settings, this.card), this.key, run.controller.signal, news);
    } catch (error) {
      this.#failed(answer, error);
    }
    if (this.running === run) this.running = null;
    if (this.conversations.includes(conversation)) this.save(conversation);
    this.show();
    say(answer.error?.message ?? `Answer: ${(answer.content || answer.reasoning).slice(0, SAID_AT_MOST)}`);
  }

  #failed(answer, error) {
    if (error.name === "AbortError") {
      answer.finish = "stopped";
      return;
    }
    const { status = null, retryAfter } = error;
    answer.finish = "error";
    answer.error = { message: error.message, status, retryAt: retryAfter ? Date.now() + 1000 * retryAfter : null };
    if (status === 0 || status === 503) this.server.look();
  }

  stop() {
    this.running?.controller.abort();
    if (this.running) this.running.answer.finish = "stopped";
    this.running = null;
  }

  save(conversation) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter((each) => each !== conversation)];
    if (!store.saveConversation(conversation)) say("The browser's storage is full: this conversation isn't saved");
  }

  #state() {
    return { running: this.running?.answer, inside: this.settings.inside, numExperts: this.card?.fireflyer?.num_experts ?? 0 };
  }

  show() {
    const { messages } = this.current;
    const continues = this.mode === "continue";
    this.log.show(messages, this.#state());
    this.sidebar.show(this.conversations, this.current);
    byId("model-name").textContent = this.settings.model || "Fireflyer";
    byId("empty").hidden = messages.length > 0;
    byId("empty-title").textContent = continues ? "How does your text begin?" : "What shall we talk about?";
    byId("empty-text").textContent = this.card
      ? `${this.card.id} reads and writes up to ${this.card.max_model_len?.toLocaleString("en") ?? "?"} tokens.`
      : "";
    byId("notice").hidden = !(continues && this.card?.fireflyer?.taught_to_chat === false);
    this.prompt.placeholder = continues ? "Text for the model to go on with" : "Message";
    byId("send").hidden = Boolean(this.running);
    byId("stop").hidden = !this.running;
    byId("look-inside").setAttribute("aria-pressed", this.settings.inside);
    document.title = this.current.title ? `${this.current.title} · Fireflyer` : "Fireflyer";
  }

  #paint() {
    document.documentElement.style.colorScheme = this.settings.theme === "auto" ? "" : this.settings.theme;
  }

  #submit() {
    if (this.running) return;
    const text = this.mode === "continue" ? this.prompt.value : this.prompt.value.trim();
    this.send(text);
    if (text.trim()) this.prompt.value = "";
    this.#fit();
  }

  /** The field grows with its text, up to what the style allows. */
  #fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
    byId("send").disabled = !this.prompt.value.trim();
  }

  toggleInside() {
    this.settings.inside = !this.settings.inside;
    store.saveSettings(this.settings);
    this.show();
  }

  #listen() {
    this.prompt.addEventListener("input", () => this.#fit());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#submit();
      } else if (event.key === "ArrowUp" && !this.prompt.value && !this.running) {
        event.preventDefault();
        this.log.last("user")?.edit();
      }
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("stop").addEventListener("click", () => {
      this.running?.controller.abort();
      this.prompt.focus();
    });
    byId("look-inside").addEventListener("click", () => this.toggleInside());
    byId("open-settings").addEventListener("click", () => this.dialog.open());
    byId("chat-anyway").addEventListener("click", () => {
      this.settings.mode = "chat";
      this.dialog.form.elements.mode.value = "chat";
      this.changed(this.key);
      this.prompt.focus();
    });
    document.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("pagehide", () => this.running && store.saveConversation(this.running.conversation));
    this.#fit();
  }

  #key(event) {
    if (document.querySelector("dialog[open]")) return;
    const writes = event.target.matches?.("input, textarea, select");
    const alt = event.altKey && { KeyN: "new", KeyI: "inside", Comma: "settings" }[event.code];
    if (event.key === "Escape" && this.running) this.running.controller.abort();
    else if (alt === "new") this.open(store.newConversation());
    else if (alt === "inside") this.toggleInside();
    else if (alt === "settings") this.dialog.open();
    else if (event.key === "/" && !writes) this.prompt.focus();
    else return;
    event.preventDefault();
  }
}

new App();
