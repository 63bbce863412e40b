// From a conversation to a request, and from its chunks to a message. Nothing here touches the page.

import { stream } from "./api.js";

const CONTINUATION_TOKENS = 512; // the API's own 16 for plain completions are few to look at
const RATE_WINDOW_MS = 2000;

/** "chat", or "continue" where the model only goes on with a text: asked for, or as the server says it was trained. */
export function modeOf(settings, card) {
  if (settings.mode !== "auto") return settings.mode;
  return card?.fireflyer?.taught_to_chat === false ? "continue" : "chat";
}

export function newAnswer(mode, model) {
  return {
    role: "assistant",
    content: "",
    reasoning: "",
    thinkingMs: null,
    calls: [],
    plain: mode === "continue",
    model,
    finish: null,
    error: null,
    stats: { tokens: 0, perSecond: null, guessed: 0, acceptance: null, promptTokens: null, cachedTokens: null },
    trace: { tokens: [], drafted: [], experts: [] },
  };
}

/** An answer that can be gone on with: it was cut, and did not end in calls. */
export function canGoOn(message) {
  const cut = message.finish === "length" || message.finish === "stopped";
  return cut && message.calls.length === 0 && Boolean(message.content || message.reasoning);
}

function sampling(settings) {
  const given = {
    temperature: settings.temperature,
    top_p: settings.topP,
    max_tokens: settings.maxTokens,
    seed: settings.seed,
  };
  const numbers = Object.entries(given).filter(([, value]) => value !== "");
  return Object.fromEntries(numbers.map(([name, value]) => [name, Number(value)]));
}

/** A message as the API has it, and after it what its calls gave back. */
function asSent(message) {
  if (message.role === "user") return [{ role: "user", content: message.content }];
  const calls = message.calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments || "{}" },
  }));
  const said = { role: "assistant", content: message.content, ...(calls.length ? { tool_calls: calls } : {}) };
  const results = message.calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result ?? "" }));
  return [said, ...results];
}

/** The path and body that ask for `answer`, which follows `history`; what it holds already is gone on with. */
export function requestFor(answer, history, settings, card) {
  const shared = {
    ...(settings.model ? { model: settings.model } : {}),
    ...sampling(settings),
    stream: true,
    stream_options: { include_usage: true },
    fireflyer: { experts: settings.inside },
  };
  if (answer.plain) {
    const prompt = (history.at(-1)?.content ?? "") + answer.content;
    const most = Math.min(CONTINUATION_TOKENS, card?.fireflyer?.max_output_tokens ?? Infinity);
    return ["v1/completions", { max_tokens: most, ...shared, prompt }];
  }
  const messages = history.filter((each) => each.role !== "assistant" || each.content || each.calls.length);
  const body = { ...shared, messages: messages.flatMap(asSent) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  if (settings.thinking !== "auto") body.chat_template_kwargs = { thinking: settings.thinking === "on" };
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  if (answer.content || answer.reasoning) {
    const begun = { role: "assistant", content: answer.content, reasoning_content: answer.reasoning || undefined };
    body.messages.push(begun);
    body.add_generation_prompt = false;
    body.continue_final_message = true;
  }
  return ["v1/chat/completions", body];
}

/** Asks, and lets `answer` grow; `news` is called after each chunk. Throws what `stream` throws. */
export async function ask(answer, [path, body], key, signal, news) {
  const clock = new Clock(answer);
  answer.finish = null;
  answer.error = null;
  for await (const chunk of stream(path, body, key, signal)) {
    const choice = chunk.choices?.[0];
    if (choice) take(answer, choice, clock);
    if (chunk.fireflyer) inside(answer, chunk.fireflyer, clock);
    if (chunk.usage) {
      answer.stats.promptTokens = chunk.usage.prompt_tokens;
      answer.stats.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? null;
    }
    news();
  }
}

function take(answer, choice, clock) {
  const delta = choice.delta ?? { content: choice.text };
  if (delta.reasoning_content) {
    clock.think();
    answer.reasoning += delta.reasoning_content;
  }
  if (delta.content) {
    clock.endThinking();
    answer.content += delta.content;
  }
  for (const piece of delta.tool_calls ?? []) {
    clock.endThinking();
    const index = piece.index ?? 0;
    const call = (answer.calls[index] ??= { id: piece.id ?? `call_${index}`, name: "", arguments: "", result: null });
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  if (choice.finish_reason) {
    clock.endThinking();
    answer.finish = choice.finish_reason;
  }
}

function inside(answer, extras, clock) {
  const { trace, stats } = answer;
  const ids = extras.token_ids ?? [];
  ids.forEach((id, place) => {
    trace.tokens.push(extras.tokens?.[place] ?? `#${id}`);
    trace.drafted.push(extras.drafted?.[place] ? 1 : 0);
    trace.experts.push(extras.experts?.[place] ?? null);
    stats.guessed += extras.drafted?.[place] ? 1 : 0;
  });
  stats.tokens += ids.length;
  clock.count(ids.length);
  if (extras.tokens_per_s != null) stats.perSecond = extras.tokens_per_s;
  if (extras.acceptance != null) stats.acceptance = extras.acceptance;
}

/** How long it thinks, and how fast it writes: over the last two seconds. */
class Clock {
  #answer;
  #thinkingSince = null;
  #thoughtMs;
  #recent = [];

  constructor(answer) {
    this.#answer = answer;
    this.#thoughtMs = answer.thinkingMs ?? 0;
  }

  think() {
    this.#thinkingSince ??= performance.now();
    this.#answer.thinkingMs = this.#thoughtMs + performance.now() - this.#thinkingSince;
  }

  endThinking() {
    if (this.#thinkingSince === null) return;
    this.#thoughtMs = this.#answer.thinkingMs = this.#thoughtMs + performance.now() - this.#thinkingSince;
    this.#thinkingSince = null;
  }

  count(tokens) {
    if (tokens === 0) return;
    const now = performance.now();
    this.#recent.push([now, tokens]);
    while (now - this.#recent[0][0] > RATE_WINDOW_MS) this.#recent.shift();
    const [first, early] = this.#recent[0];
    const later = this.#recent.reduce((sum, [, count]) => sum + count, 0) - early;
    if (later > 0 && now > first) this.#answer.stats.perSecond = (later / (now - first)) * 1000;
  }
}
