/**
 * What programs do with fal's client, unmodified: one function per verb, the same in Node and in a page.
 *
 * `perform` takes a message as JSON text and gives JSON text back, so that a test in another process or on the other
 * side of a browser can ask for it.
 */

import { ApiError, ValidationError, createFalClient } from "@fal-ai/client";

const ENDPOINT = "fal-ai/creative-upscaler";
const PREFIXES = {
  "https://fal.run": "/run",
  "https://queue.fal.run": "/queue",
  "https://rest.fal.ai": "/rest",
};

const calls = [];
const originalFetch = globalThis.fetch.bind(globalThis);

/** Every call over the network, recorded; one that would leave this machine fails. */
globalThis.fetch = async (url, init = {}) => {
  const { hostname } = new URL(url);
  if (hostname !== "127.0.0.1" && hostname !== "localhost") {
    throw new Error(`${url} is not on this machine`);
  }
  const call = {
    method: init.method ?? "GET",
    url: String(url),
    target: init.headers?.["x-fal-target-url"] ?? null,
    body: typeof init.body === "string" ? init.body : null,
    status: null,
  };
  calls.push(call);
  const response = await originalFetch(url, init);
  call.status = response.status;
  return response;
};

/** fal's address as this server's, by the prefix that stands for the host. */
function redirected(base, url) {
  const { origin } = new URL(url);
  return origin in PREFIXES ? base + PREFIXES[origin] + url.slice(origin.length) : url;
}

/** The ways to point a client here. */
const CLIENTS = {
  proxy: (base) => ({ proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" } }),
  page: (base) => ({ proxyUrl: `${base}/api/fal/proxy` }),
  middleware: (base) => ({
    requestMiddleware: async (request) => ({ ...request, url: redirected(base, request.url) }),
  }),
  fetch: (base) => ({ fetch: (url, init) => fetch(redirected(base, url), init) }),
  chained: (base, via) => ({
    requestMiddleware: async (request) => ({ ...request, url: redirected(base, request.url) }),
    proxyUrl: { url: via, when: "always" },
  }),
};

const VERBS = {
  run: (fal, options) => fal.run(ENDPOINT, options),
  submit: (fal, options) => fal.queue.submit(ENDPOINT, options),
  status: (fal, options) => fal.queue.status(ENDPOINT, options),
  result: (fal, options) => fal.queue.result(ENDPOINT, options),
  cancel: (fal, options) => fal.queue.cancel(ENDPOINT, options),

  /** Reports ids and updates as they come; `cancelAt` cancels once that many lines were logged. */
  async subscribe(fal, { cancelAt, endpoint = ENDPOINT, ...options }, notes) {
    Object.assign(notes, { ids: [], updates: [] });
    let isCancelled = false;
    return fal.subscribe(endpoint, {
      ...options,
      onEnqueue: (requestId) => notes.ids.push(requestId),
      onQueueUpdate: (update) => {
        notes.updates.push(structuredClone(update));
        if (cancelAt && !isCancelled && (update.logs ?? []).length >= cancelAt) {
          isCancelled = true;
          fal.queue.cancel(ENDPOINT, { requestId: update.request_id });
        }
      },
    });
  },

  /** A model stream: its events, and its last one. */
  async stream(fal, options, notes) {
    const stream = await fal.stream(ENDPOINT, options);
    notes.events = [];
    stream.on("data", (event) => notes.events.push(event));
    const last = await stream.done();
    notes.requestId = stream.requestId;
    return last;
  },

  /** Where a file was stored, and the digest of what was sent. */
  async upload(fal, { file, ...options }) {
    const url = await fal.storage.upload(file, options);
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
    return { url, sha256: Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") };
  },

  /** What a page can read of a file by its URL. */
  async read(fal, { url }) {
    const answers = [];
    for (const init of [{}, { method: "HEAD" }, { headers: { Range: "bytes=0-7" } }]) {
      const response = await fetch(url, init);
      answers.push({
        status: response.status,
        type: response.headers.get("content-type"),
        length: Number(response.headers.get("content-length")),
        bytes: Array.from(new Uint8Array(await response.arrayBuffer()).slice(0, 8)),
      });
    }
    return answers;
  },
};

/** `{"$file": {base64 | size, name, type}}` as the File it stands for, a Blob where it has no name. */
function revive(key, value) {
  const description = value?.$file;
  if (!description) return value;
  const bytes = description.base64
    ? Uint8Array.from(atob(description.base64), (letter) => letter.charCodeAt(0))
    : noise(description.size);
  const { name, type = "" } = description;
  return name ? new File([bytes], name, { type }) : new Blob([bytes], { type });
}

/** Bytes without a pattern, the same every time. */
function noise(size) {
  const words = new Uint32Array(Math.ceil(size / 4));
  let state = 1;
  for (let n = 0; n < words.length; n++) words[n] = state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return new Uint8Array(words.buffer, 0, size);
}

/** An error as its catcher sees it. */
function describe(error) {
  const { name, message, status, body, requestId, timeoutType } = error;
  const description = { name, message, status, body, requestId, timeoutType };
  if (error instanceof ApiError) description.isUserTimeout = error.isUserTimeout;
  if (error instanceof ValidationError) {
    description.fieldErrors = error.fieldErrors;
    description.imageErrors = error.getFieldErrors("image_url");
  }
  return description;
}

/** Do what a message says: `{verb, client, base, via, credentials, options}`. */
export async function perform(text) {
  const { verb, client, base, via, credentials, options } = JSON.parse(text, revive);
  calls.length = 0;
  const notes = {};
  const answer = { notes };
  const started = performance.now();
  try {
    const fal = createFalClient({ credentials, ...CLIENTS[client](base, via) });
    answer.value = await VERBS[verb](fal, options, notes);
  } catch (error) {
    answer.error = describe(error);
  }
  answer.seconds = (performance.now() - started) / 1000;
  answer.calls = calls;
  return JSON.stringify(answer);
}
