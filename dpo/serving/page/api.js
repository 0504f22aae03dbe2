// Requests to the server: JSON calls, streamed answers, the API key, and error messages for the user.

const KEY = "dpo.key";

/** An error whose message is a sentence for the user. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const hooks = { askKey: null, pendingKey: null, onReachable: () => {} };

/** `askKey(wrong)` resolves to a key or null; `onReachable(yes)` is called with whether the server responded at all. */
export function connect(askKey, onReachable) {
  Object.assign(hooks, { askKey, onReachable });
}

/** Ask for the key, once for all calls that were refused. */
function requestKey(wrong) {
  hooks.pendingKey ??= hooks.askKey(wrong).finally(() => (hooks.pendingKey = null));
  return hooks.pendingKey;
}

async function toError(response) {
  const body = await response.json().catch(() => ({}));
  const message = body?.error?.message ?? `status ${response.status}`;
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 429) {
    const when = wait ? `in ${wait} ${wait === 1 ? "second" : "seconds"}` : "in a moment";
    return new ServerError(`The server is busy. Try again ${when}.`, 429);
  }
  if (response.status === 503) return new ServerError(`The model is not ready: ${message}`, 503);
  if (response.status >= 500) return new ServerError(`The server reported an error: ${message}`, response.status);
  return new ServerError(message, response.status);
}

async function call(path, options = {}, signal) {
  const stored = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(stored ? { Authorization: `Bearer ${stored}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    hooks.onReachable(false);
    throw new ServerError("The server is not responding. Is it still running?");
  }
  hooks.onReachable(true);
  if (response.ok) return response;
  if (response.status === 401) {
    const current = sessionStorage.getItem(KEY);
    const key = current !== stored ? current : await requestKey(Boolean(stored)); // another call may have set it
    if (!key) throw new ServerError("This server requires a key.", 401);
    sessionStorage.setItem(KEY, key);
    return call(path, options, signal);
  }
  throw await toError(response);
}

// Half a surrogate pair cannot be encoded as UTF-8, so it is replaced.
const wellFormed = (_, value) => (typeof value === "string" && value.toWellFormed?.()) || value;

const json = (body) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body, wellFormed),
});

export const get = async (path) => (await call(path)).json();
export const post = async (path, body, signal) => (await call(path, json(body), signal)).json();

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yield the chunks of a streamed chat completion; a stream that ends without [DONE] is an error. */
export async function* chat(body, signal) {
  const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", json(streaming), signal);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The answer was cut off: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  throw new ServerError("The answer was cut off: the connection closed.");
}
