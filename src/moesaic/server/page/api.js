// Talks to the server this page came from, with its key where it has one.
const keyName = "moesaicKey";
let key = "";
// A browser may forbid storage; the key then lasts as long as the page.
try { key = sessionStorage.getItem(keyName) ?? ""; } catch { key = ""; }

export function setKey(value) {
  key = value;
  try { sessionStorage.setItem(keyName, value); } catch { /* not kept */ }
}

export class ApiError extends Error {
  constructor(message, status, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// The response, or an ApiError with the server's own words. `body`, if any, is sent as JSON.
export async function ask(path, { body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Look whether moesaic serve still runs, then send again.", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answers with status ${response.status} and no reason; its log may know more.`;
  }
  return new ApiError(retryAfter ? `${message} (try again in ${retryAfter} s)` : message, response.status, retryAfter);
}

// The objects of a stream of server-sent events, up to [DONE]; an `error` among them is thrown.
export async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, 200);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection broke. Look whether moesaic serve still runs, then retry.", 0);
    throw error;
  } finally {
    await reader.cancel().catch(() => {});
  }
}
