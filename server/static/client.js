/** The server's API as any client sees it: documents, uploads, the queue. */

const ROOT = new URL("..", import.meta.url);
const RECONNECT_MS = 1000;
const UPLOAD_PATH = "files/";

/** An answer that is not a success: `status`, and the body as `faults` (fal's list) or as the message. */
export class ApiError extends Error {
  constructor(status, body) {
    const detail = body?.detail;
    super(typeof detail === "string" ? detail : detail?.[0]?.msg ?? `The server answered ${status}.`);
    this.status = status;
    this.type = body?.error_type ?? detail?.[0]?.type;
    this.faults = Array.isArray(detail) ? detail : [];
  }
}

/** Where this server is, without a final slash. */
export const origin = () => ROOT.href.replace(/\/$/, "");

/** A file of this server by the URL that the server gave, under the address that this page has. */
export function ownFile(url) {
  const place = typeof url === "string" ? url.indexOf(`/${UPLOAD_PATH}`) : -1;
  if (place < 0) return null;
  const { origin: host } = new URL(url, ROOT);
  return host === ROOT.origin ? url : new URL(url.slice(place + 1), ROOT).href;
}

export class Client {
  key = "";

  /** What the server says of itself. */
  facts() {
    return this.#json("playground/server.json", { cache: "no-store" });
  }

  /** The OpenAPI document of an endpoint. */
  document(endpoint) {
    return this.#json(`api/openapi/queue/openapi.json?endpoint_id=${encodeURIComponent(endpoint)}`);
  }

  /** Store a file; returns its URL. */
  async upload(file, signal) {
    const place = await this.#json("storage/upload/initiate", {
      method: "POST",
      body: JSON.stringify({ file_name: file.name || "picture", content_type: file.type || "application/octet-stream" }),
      headers: { "Content-Type": "application/json" },
      signal,
    });
    const target = new URL(place.upload_url);
    await this.#json(`storage/${target.href.split("/storage/")[1]}`, { method: "PUT", body: file, signal });
    return place.file_url;
  }

  /** Queue a request; returns its id. */
  async submit(endpoint, input) {
    const answer = await this.#json(`queue/${endpoint}`, {
      method: "POST",
      body: JSON.stringify(input),
      headers: { "Content-Type": "application/json" },
    });
    return answer.request_id;
  }

  /** A small picture of how far a running request is, as a Blob; null when there is none. */
  async preview(endpoint, id, signal) {
    const response = await this.#fetch(`queue/${endpoint}/requests/${id}/preview`, { signal, cache: "no-store" });
    return response.status === 200 ? response.blob() : null;
  }

  /** What a request came to: `{data, servedFrom}`; asked for until there is an answer. */
  async result(endpoint, id, signal) {
    for (;;) {
      try {
        const response = await this.#fetch(`queue/${endpoint}/requests/${id}`, { signal });
        return { data: await response.json(), servedFrom: response.headers.get("x-fal-served-from") };
      } catch (error) {
        if (signal.aborted || error instanceof ApiError) throw error;
      }
      await pause(signal);
    }
  }

  /** Ask for the end of a request. */
  async cancel(endpoint, id) {
    try {
      await this.#json(`queue/${endpoint}/requests/${id}/cancel`, { method: "PUT" });
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 400)) throw error; // it was over already
    }
  }

  /**
   * The states of a request from now until it is over, each with all log lines so far.
   *
   * A connection that breaks is made again; the server then tells everything from the beginning.
   */
  async *follow(endpoint, id, signal) {
    for (;;) {
      const logs = [];
      try {
        const response = await this.#fetch(`queue/${endpoint}/requests/${id}/status/stream?logs=1`, { signal });
        for await (const event of events(response.body)) {
          logs.push(...(event.logs ?? []));
          yield { ...event, logs };
          if (event.status === "COMPLETED") return;
        }
      } catch (error) {
        if (signal.aborted || (error instanceof ApiError && error.status < 500)) throw error;
      }
      await pause(signal);
    }
  }

  async #json(path, options) {
    return (await this.#fetch(path, options)).json();
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Key ${this.key}` }) };
    const response = await fetch(new URL(path, ROOT), { ...options, headers });
    if (response.ok) return response;
    throw new ApiError(response.status, await response.json().catch(() => null));
  }
}

/** Wait a moment before asking again; throws if nobody wants to know any more. */
async function pause(signal) {
  await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
  signal.throwIfAborted();
}

/** The data of server-sent events, parsed; comments are left out. */
async function* events(body) {
  let rest = "";
  for await (const text of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

/** A stream's chunks; not every browser can iterate a stream itself. */
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
