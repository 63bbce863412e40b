// What outlives the page: conversations and settings in localStorage, the API key in this tab's sessionStorage only.

const CHAT = "fireflyer.chat.";
const SETTINGS = "fireflyer.settings";
const KEY = "fireflyer.key";

/** Temperature and top-p as DeepSeek recommends for R1. Texts as the reader typed them; "" leaves it to the server. */
export const DEFAULTS = Object.freeze({
  model: "",
  mode: "auto",
  system: "",
  temperature: "0.6",
  topP: "0.95",
  maxTokens: "",
  seed: "",
  thinking: "auto",
  tools: "",
  theme: "auto",
  inside: false,
});

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

export function loadSettings() {
  const stored = read(SETTINGS) ?? {};
  const known = Object.entries(DEFAULTS).map(([name, value]) => [
    name,
    typeof stored[name] === typeof value ? stored[name] : value,
  ]);
  return Object.fromEntries(known);
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold for this visit.
  }
}

export function loadKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function newConversation() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", updated: Date.now(), messages: [] };
}

/** All that are stored, newest first. */
export function loadConversations() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  const found = names.map(read).filter((each) => each?.id && Array.isArray(each.messages));
  for (const { messages } of found) {
    const last = messages.at(-1);
    if (last?.role === "assistant") last.finish ??= "stopped"; // the page was closed while it was written
  }
  return found.sort((one, other) => other.updated - one.updated);
}

/** False if the browser's storage is full even without what "look inside" shows. */
export function saveConversation(conversation) {
  const light = (name, value) => (name === "trace" ? undefined : value);
  for (const replacer of [null, light]) {
    try {
      localStorage.setItem(CHAT + conversation.id, JSON.stringify(conversation, replacer));
      return true;
    } catch {
      continue;
    }
  }
  return false;
}

export function deleteConversation(id) {
  localStorage.removeItem(CHAT + id);
}

/** Calls `changed` when another tab changed the conversations. */
export function watch(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) changed();
  });
}
