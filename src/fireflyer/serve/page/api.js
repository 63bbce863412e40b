// The server: OpenAI's API, and whether it's ready. Every failure is one RequestError with a line for the reader.

/** `status`: HTTP's, 0 where no answer came. `retryAfter`: seconds, or null. */
export class RequestError extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const LOST = "The connection to the server was lost.";

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function send(path, init) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...init });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The server doesn't answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw refusal(response.status, body?.error ?? {}, response.headers.get("Retry-After"));
}

function refusal(status, error, retryAfter) {
  const said = error.message || `The server answered with status ${status}.`;
  const message = {
    401: "This server asks for an API key, and has none that it accepts.",
    429: `The server is busy: ${said}`,
    503: `The server can't answer now: ${said}`,
  }[status];
  const seconds = Number.parseInt(retryAfter, 10);
  return new RequestError(status, message ?? said, {
    code: error.code,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

/** The models served: [{id, max_model_len, ...}]. */
export async function models(key) {
  const response = await send("v1/models", { headers: headers(key) });
  return (await response.json()).data;
}

/** "ready", or why not; null where no server answers. */
export async function readiness() {
  try {
    const response = await fetch("ready", { cache: "no-store" });
    return (await response.json()).status ?? `status ${response.status}`;
  } catch {
    return null;
  }
}

/** The chunks of a streamed answer. Throws RequestError; AbortError once `signal` is aborted. */
export async function* stream(path, body, key, signal) {
  const response = await send(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  const reader = response.body.getReader();
  try {
    for await (const data of events(reader)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw refusal(500, chunk.error, null);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError(0, LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new RequestError(0, LOST);
}

/** The data of server-sent events, each of one line. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
