// Speaks with the server: JSON calls, streams, the key, and errors in plain words. Knows nothing of the page.

const KEY = "dpo.key";

/** What went wrong, as a sentence for the reader. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const door = { ask: null, asking: null, heard: () => {} };

/** `askKey(wrong)` resolves to a key or null; `heard(yes)` is told whether the server answered at all. */
export function connect(askKey, heard) {
  Object.assign(door, { ask: askKey, heard });
}

/** One question for the key, however many calls were refused. */
function key(wrong) {
  door.asking ??= door.ask(wrong).finally(() => (door.asking = null));
  return door.asking;
}

async function explained(response) {
  const body = await response.json().catch(() => ({}));
  const said = body?.error?.message ?? `status ${response.status}`;
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 429) {
    const when = wait ? `in ${wait} ${wait === 1 ? "second" : "seconds"}` : "in a moment";
    return new ServerError(`The server is busy. Try again ${when}.`, 429);
  }
  if (response.status === 503) return new ServerError(`The model is not ready: ${said}`, 503);
  if (response.status >= 500) return new ServerError(`The server failed at this: ${said}`, response.status);
  return new ServerError(said, response.status);
}

async function call(path, options = {}, signal) {
  const stored = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(stored ? { Authorization: `Bearer ${stored}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    door.heard(false);
    throw new ServerError("The server does not answer. Is it still running?");
  }
  door.heard(true);
  if (response.ok) return response;
  if (response.status === 401) {
    const given = sessionStorage.getItem(KEY) !== stored ? sessionStorage.getItem(KEY) : await key(Boolean(stored));
    if (!given) throw new ServerError("The server wants a key before it answers.", 401);
    sessionStorage.setItem(KEY, given);
    return call(path, options, signal);
  }
  throw await explained(response);
}

// Half a surrogate pair is no character, and no text that a server could read.
const readable = (_, value) => (typeof value === "string" && value.toWellFormed?.()) || value;

const json = (body) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body, readable),
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

/** The chunks of a streamed chat completion; a stream that does not say it is done is an error. */
export async function* chat(body, signal) {
  const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", json(streaming), signal);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The answer broke off: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  throw new ServerError("The answer broke off: the connection was closed.");
}
