/** The page: picture in, request through the queue, picture out. */

import { LANGUAGES } from "./calls.js";
import { ApiError, Client, origin, ownFile } from "./client.js";
import { Comparison } from "./comparison.js";
import { find, inBytes, inTime, inWords, make } from "./elements.js";
import { Form, schemasOf } from "./form.js";
import { History, thumbnail } from "./history.js";

const KEY_PLACE = "creative-upscaler.key";
const FACTS_MS = 10_000;
const FACTS_SOON_MS = 1500;
const PREVIEW_MS = 1000;
const UNSEEN_MS = 100;
const STEP = /^(.+) (\d+)\/(\d+)$/;
const STAGE_END = /^(.+) done in ([\d.]+) s$/;
const WEIGHTS = {
  pocket: [
    "Pocket weights are serving.",
    " Small networks, trained on drawn pictures and seven photographs. They make a true but modest upscale: edges and " +
      "textures get sharper. They do not invent faces, fur or lettering as the published models do.",
  ],
  full: ["The full weights are serving:", " the published models."],
};
const LOCAL_ONLY = "The server fetches this picture by its address. It is not shown here: this page asks no other host.";

const client = new Client();
const history = new History();
const comparison = new Comparison(find("#comparison"), (scale) => {
  find("#scale").textContent = `${Math.round(scale * 100)} %`;
});

/** What the page is about: a picture, an endpoint, the request that is watched. */
const page = {
  facts: null,
  endpoint: "",
  form: null,
  file: null, // a picture of one's own disk
  fileUrl: null, // the same, for this browser
  stored: null, // {file, url} of the last upload
  watch: null, // {entry, abort} of the request that is watched
  language: "curl",
};

// -- what the server is ---------------------------------------------------------------------------------------------

async function readFacts() {
  let facts = null;
  try {
    facts = await client.facts();
    page.facts = facts;
    if (!page.form) await begin(facts);
  } catch {
    facts = null; // said in the line about the server, and tried again
  }
  showServer(facts);
  const again = () => (document.hidden ? document.addEventListener("visibilitychange", readFacts, { once: true }) : readFacts());
  setTimeout(again, facts?.is_ready ? FACTS_MS : FACTS_SOON_MS);
}

function showServer(facts) {
  const line = find("#server");
  if (!facts) {
    [line.dataset.state, line.textContent] = ["down", "The server does not answer"];
    return;
  }
  const up = facts.slots.filter((slot) => slot.state === "ready" || slot.state === "busy");
  const isBusy = up.length > 0 && up.every((slot) => slot.state === "busy");
  const names = [...new Set((up.length ? up : facts.slots).map((slot) => slot.weights).filter(Boolean))];
  const devices = [...new Set(up.map((slot) => slot.device.toUpperCase()).filter(Boolean))];
  line.dataset.state = facts.is_ready ? (isBusy ? "busy" : "ready") : "starting";
  const state = facts.is_ready ? (isBusy ? "Busy" : "Ready") : "Starting";
  line.textContent = [state, ...names.map((name) => `${name} weights`), ...devices].join(" · ");
  const note = find("#weights");
  note.hidden = names.length === 0;
  note.replaceChildren(...names.flatMap((name) => {
    const [title, text] = WEIGHTS[name] ?? [`Weights: ${name}.`, ""];
    return [make("strong", {}, title), text, " "];
  }));
}

async function begin(facts) {
  find("#key").hidden = facts.is_open;
  const select = find("#endpoint");
  select.replaceChildren(...facts.endpoints.map(({ id }) => make("option", { value: id }, id)));
  const unfinished = history.requests.find((entry) => entry.outcome === "running");
  await choose(facts.endpoints[0].id);
  if (unfinished) await open(unfinished);
  performance.mark("usable");
}

// -- the form --------------------------------------------------------------------------------------------------------

async function choose(endpoint) {
  const known = page.facts.endpoints.find(({ id }) => id === endpoint);
  const { input, resolve } = schemasOf(await client.document(endpoint), endpoint);
  const before = page.form?.changed() ?? {};
  const picture = page.form && before[page.form.picture];
  page.endpoint = endpoint;
  find("#endpoint").value = endpoint;
  find("#endpoint-help").textContent = known?.description ?? "";
  page.form = new Form(find("#fields"), { input, resolve }, showCall);
  if (picture) page.form.set(page.form.picture, picture);
  const address = find(`[data-name="${page.form.picture}"] input`);
  address?.addEventListener("change", () => chooseAddress(address.value.trim()));
  showFile();
  showCall();
}

/** The chosen file in the picture's field, in place of an address. */
function showFile() {
  const field = find(`[data-name="${page.form.picture}"]`);
  if (!field) return;
  find(".file", field)?.remove();
  const input = find("input", field);
  input.hidden = page.file !== null;
  if (!page.file) return;
  const remove = make("button", { type: "button", "aria-label": `Remove ${page.file.name}`, on: { click: () => chooseFile(null) } }, "Remove");
  input.before(make("div", { class: "file" }, make("span", {}, `${page.file.name || "Pasted picture"} · ${inBytes(page.file.size)}`), remove));
}

async function chooseFile(file) {
  unwatch();
  clearFaults();
  if (page.fileUrl) URL.revokeObjectURL(page.fileUrl);
  if (file?.type && !file.type.startsWith("image/")) {
    fault(page.form.picture, `${file.name} is not a picture.`);
    file = null;
  }
  page.file = file;
  page.fileUrl = file ? URL.createObjectURL(file) : null;
  page.form.set(page.form.picture, undefined);
  showFile();
  await showPictures(page.fileUrl, null, file ? "This browser cannot show the picture; the server may well read it." : null);
  showCall();
}

async function chooseAddress(address) {
  unwatch();
  clearFaults();
  page.file = page.fileUrl = null;
  page.form.set(page.form.picture, address || undefined);
  showFile();
  await showPictures(ownFile(address), null, address ? LOCAL_ONLY : null);
  showCall();
}

/** Before and after, as far as there are any; what to say if neither can be shown. */
async function showPictures(before, after, otherwise) {
  const size = await comparison.show(before, after);
  if (!size && otherwise) comparison.say(otherwise);
  find("#tools").hidden = !size && !otherwise;
  find(".zoom").hidden = !size;
  find("#caption").textContent = size ? `${size.width} × ${size.height} px` : "";
  find("#download").hidden = true;
  find("#facts").hidden = true;
}

function clearFaults() {
  page.form.clearFaults();
  find("#run-fault").textContent = find("#key-fault").textContent = "";
}

/** A fault where it belongs: at its field if there is one. */
function fault(name, message) {
  if (!page.form.showFault(name, message)) find("#run-fault").textContent += `${find("#run-fault").textContent ? " " : ""}${message}`;
}

function showFaults(error) {
  if (error.status === 401) {
    find("#key").hidden = false;
    find("#key-fault").textContent = error.message;
    find("#key-input").focus();
    return;
  }
  if (!error.faults?.length) find("#run-fault").textContent = error.message;
  for (const { loc, msg } of error.faults ?? []) fault(loc?.[0] === "body" ? loc[1] : undefined, msg);
  pointAtFaults();
}

/** Move to the first faulty field, and say at the button that there is one; false if there is none. */
function pointAtFaults() {
  const count = page.form.focusFault();
  if (count && !find("#run-fault").textContent) {
    find("#run-fault").textContent = count === 1 ? "One parameter needs another value." : `${count} parameters need other values.`;
  }
  return count > 0;
}

// -- running ---------------------------------------------------------------------------------------------------------

async function run() {
  if (page.watch) return;
  clearFaults();
  for (const name of page.form.unreadable()) fault(name, "This cannot be read.");
  const input = page.form.changed();
  const field = page.form.picture;
  if (!page.file && !input[field]) fault(field, "Choose a picture, or give its address.");
  if (pointAtFaults()) return;
  const watch = { entry: null, abort: new AbortController(), started: Date.now() };
  begun(watch);
  try {
    if (page.file) input[field] = await upload(watch);
    phase("Sending the request");
    const id = await client.submit(page.endpoint, input);
    const facts = { id, endpoint: page.endpoint, at: watch.started, input, field, outcome: "running" };
    watch.entry = history.add({ ...facts, name: page.file?.name ?? "" });
    showHistory();
    if (page.fileUrl) thumbnail(page.fileUrl).then((picture) => remember(watch.entry, { thumbnail: watch.entry.thumbnail ?? picture }));
    if (watch.abort.signal.aborted) await client.cancel(page.endpoint, id);
    else await follow(watch);
  } catch (error) {
    ended(watch, error);
  }
}

/** The address of the chosen file on the server; a file is sent once. */
async function upload(watch) {
  phase("Uploading the picture");
  if (page.stored?.file !== page.file) {
    page.stored = { file: page.file, url: await client.upload(page.file, watch.abort.signal) };
  }
  return page.stored.url;
}

async function follow(watch) {
  const { entry, abort } = watch;
  for await (const update of client.follow(entry.endpoint, entry.id, abort.signal)) {
    showLog(update.logs);
    if (update.status === "IN_QUEUE") {
      const ahead = update.queue_position ?? 0;
      phase(ahead ? `Waiting, ${ahead} ahead` : "Waiting for its turn");
    } else if (update.status === "IN_PROGRESS" && !watch.isStopping) {
      showStage(update.logs);
      watch.previews ??= showPreviews(watch);
    } else if (update.status === "COMPLETED") {
      watch.seconds = update.metrics?.inference_time;
    }
  }
  const result = await client.result(entry.endpoint, entry.id, abort.signal);
  const picture = pictureOf(result.data);
  remember(entry, { outcome: "done", result, width: picture?.width, height: picture?.height, seconds: watch.seconds });
  if (page.watch !== watch) return;
  const { seconds } = watch;
  phase(`Done${seconds ? ` in ${seconds < 100 ? `${seconds.toFixed(1)} s` : inTime(seconds)}` : ""}`);
  finish(watch);
  await showResult(entry);
  find("#comparison").scrollIntoView({ block: "nearest" });
  if (picture) thumbnail(ownFile(picture.url) ?? picture.url).then((small) => small && remember(entry, { thumbnail: small }));
}

/** The newest preview beside the picture, renewed while the request runs. */
async function showPreviews(watch) {
  const { entry, abort } = watch;
  const isCurrent = page.stored?.url === entry.input[entry.field];
  const before = isCurrent && page.fileUrl ? page.fileUrl : ownFile(entry.input[entry.field]);
  let shown = null;
  watch.restore = () => shown && comparison.show(before, null);
  while (page.watch === watch && !watch.isStopping) {
    try {
      const blob = await client.preview(entry.endpoint, entry.id, abort.signal);
      if (blob && page.watch === watch) {
        const url = URL.createObjectURL(blob);
        await comparison.show(before, url, "Preview");
        if (shown) URL.revokeObjectURL(shown);
        shown = url;
        find("#tools").hidden = find(".zoom").hidden = false;
      }
    } catch {
      /* without a preview one waits as well */
    }
    await new Promise((resolve) => setTimeout(resolve, PREVIEW_MS));
  }
  if (shown) URL.revokeObjectURL(shown);
}

function begun(watch) {
  page.watch = watch;
  find("#progress").hidden = false;
  find("#facts").hidden = true;
  find("#run").disabled = true;
  find("#cancel").hidden = false;
  find("#cancel").disabled = false;
  find("#comparison").dataset.running = "true";
  showLog([]);
  watch.timer = setInterval(() => showElapsed(watch), 250);
  showElapsed(watch);
  const isInSight = find("#comparison").getBoundingClientRect().top >= 0 && find("#bar").getBoundingClientRect().bottom <= innerHeight;
  if (!isInSight) find("#comparison").scrollIntoView({ block: "start" }); // picture and progress below it
}

/** Back to where a request can be made. */
function finish(watch) {
  clearInterval(watch.timer);
  if (page.watch !== watch) return;
  page.watch = null;
  find("#run").disabled = false;
  find("#cancel").hidden = true;
  find("#bar").hidden = true;
  find("#elapsed").textContent = "";
  find("#comparison").dataset.running = "false";
  client.facts().then(showServer, () => {});
}

/** What is watched is looked at no longer; it goes on at the server. */
function unwatch() {
  if (!page.watch) return;
  const { watch } = page;
  watch.abort.abort();
  finish(watch);
  find("#progress").hidden = true;
}

function ended(watch, error) {
  const isOurs = page.watch === watch;
  const isCancelled = error.type === "client_cancelled" || error.name === "AbortError";
  if (watch.entry && error instanceof ApiError) {
    const outcome = isCancelled ? "cancelled" : error.status === 404 ? "gone" : "failed";
    remember(watch.entry, { outcome, message: error.message, faults: error.faults });
  }
  if (!isOurs) return;
  watch.restore?.();
  phase(isCancelled ? "Cancelled" : error.status === 404 ? "The server keeps this request no longer" : "Failed");
  finish(watch);
  if (!isCancelled) showFaults(error instanceof ApiError ? error : new Error("The server cannot be reached."));
}

async function cancel() {
  const { watch } = page;
  find("#cancel").disabled = true;
  watch.isStopping = true;
  phase("Stopping");
  if (!watch.entry) {
    watch.abort.abort();
    return;
  }
  try {
    await client.cancel(watch.entry.endpoint, watch.entry.id);
  } catch (error) {
    ended(watch, error);
  }
}

function phase(text) {
  const place = find("#phase");
  if (place.textContent !== text) place.textContent = text;
  const bar = find("#bar");
  bar.hidden = false;
  bar.removeAttribute("value");
  page.watch && (page.watch.steps = "");
}

/** Stage and step from the newest lines. */
function showStage(logs) {
  for (const { message } of [...logs].reverse()) {
    const [, stage, step, total] = STEP.exec(message) ?? [];
    if (!stage && !STAGE_END.test(message)) continue;
    phase(stage ? inWords(stage) : "Running");
    if (!stage) return;
    const bar = find("#bar");
    [bar.max, bar.value] = [Number(total), Number(step)];
    page.watch.steps = `${step} of ${total}`;
    showElapsed(page.watch);
    return;
  }
  phase("Running");
}

function showElapsed(watch) {
  const seconds = inTime((Date.now() - watch.started) / 1000);
  find("#elapsed").textContent = watch.steps ? `${watch.steps} · ${seconds}` : seconds;
}

function showLog(logs) {
  const list = find("#log");
  if (logs.length < list.children.length || logs.length === 0) list.replaceChildren();
  const isAtEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - 8;
  const first = Date.parse(logs[0]?.timestamp);
  for (const { message, level, timestamp } of logs.slice(list.children.length)) {
    const passed = (Date.parse(timestamp) - first) / 1000;
    const seconds = passed.toFixed(passed < 100 ? 1 : 0);
    const mark = level === "WARN" || level === "ERROR" ? make("b", {}, level === "WARN" ? "note " : "error ") : null;
    list.append(make("li", { data: { level } }, make("time", {}, `${seconds} s`), make("span", {}, mark, message)));
  }
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

// -- results ---------------------------------------------------------------------------------------------------------

/** The first picture in an output, whatever it is called. */
function pictureOf(data) {
  if (typeof data?.url === "string") return data;
  if (data === null || typeof data !== "object") return null;
  return Object.values(data).map(pictureOf).find(Boolean) ?? null;
}

async function showResult(entry) {
  const picture = pictureOf(entry.result.data);
  const after = picture && (ownFile(picture.url) ?? picture.url);
  const isCurrent = page.stored?.url === entry.input[entry.field];
  const before = isCurrent && page.fileUrl ? page.fileUrl : ownFile(entry.input[entry.field]);
  await showPictures(before, after, "The server keeps this picture no longer.");
  if (picture) {
    const link = find("#download");
    link.hidden = find("#comparison").dataset.state === "note";
    link.href = after;
    link.download = picture.file_name || "upscaled.png";
    const size = picture.width ? `${picture.width} × ${picture.height} px` : "";
    find("#caption").textContent = [size, picture.file_size && inBytes(picture.file_size)].filter(Boolean).join(", ");
  }
  showFactsOf(entry);
}

/** All else that the output says; a value that is a parameter as well can be kept for the next run. */
function showFactsOf({ result }) {
  const rows = [];
  const add = (name, value) => {
    const keep = page.form.has(name) && typeof value !== "object"
      ? make("button", { type: "button", on: { click: () => page.form.set(name, value) } }, "Keep for the next run")
      : null;
    rows.push(make("div", {}, make("dt", {}, inWords(name)), make("dd", {}, text(value), keep && " ", keep)));
  };
  for (const [name, value] of Object.entries(result.data)) {
    if (!pictureOf(value) && value !== null && value !== "") add(name, value);
  }
  if (result.servedFrom) add("served_from", result.servedFrom);
  find("#facts dl").replaceChildren(...rows);
  find("#facts").hidden = rows.length === 0;
}

function text(value) {
  if (typeof value === "number" && !Number.isInteger(value)) return value.toFixed(2);
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, member]) => `${name.replaceAll("_", " ")} ${text(member)}`).join(", ");
}

// -- history ---------------------------------------------------------------------------------------------------------

const OUTCOMES = { running: "not over", cancelled: "cancelled", failed: "failed", gone: "kept no longer" };

function remember(entry, facts) {
  history.update(entry, facts);
  showHistory();
}

function showHistory() {
  const rows = history.requests.map((entry) => {
    const size = entry.outcome === "done" && entry.width ? `${entry.width} × ${entry.height} px` : OUTCOMES[entry.outcome] ?? "done";
    const when = new Date(entry.at).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
    const picture = entry.thumbnail?.startsWith("data:image/") ? make("img", { src: entry.thumbnail, alt: "" }) : make("span", { class: "blank" });
    const words = make("span", { class: "words" }, make("span", {}, entry.name || "Picture"), make("small", {}, entry.endpoint), make("small", {}, `${size} · ${when}`));
    const name = `${entry.name || "Picture"}, ${entry.endpoint}`;
    return make("li", {},
      make("button", { type: "button", class: "entry", on: { click: () => open(entry) } }, picture, words),
      make("button", { type: "button", class: "forget", "aria-label": `Forget ${name}`, title: "Forget", on: { click: () => { history.remove(entry); showHistory(); } } }, "×"));
  });
  find("#requests").replaceChildren(...rows);
  find("#history-help").hidden = rows.length > 0;
  find("#clear").hidden = rows.length === 0;
}

/** Show a request of one's own again, parameters included; one that is not over is watched. */
async function open(entry) {
  unwatch();
  if (page.endpoint !== entry.endpoint) {
    if (!page.facts.endpoints.some(({ id }) => id === entry.endpoint)) return;
    await choose(entry.endpoint);
  }
  const address = entry.input[entry.field];
  const isOfFile = page.stored?.url === address && page.file === page.stored?.file;
  if (!isOfFile) page.file = page.fileUrl = null;
  page.form.fill(isOfFile ? { ...entry.input, [entry.field]: undefined } : entry.input);
  clearFaults();
  showFile();
  find("#progress").hidden = true;
  find("#stage").scrollIntoView({ block: "nearest" });
  if (entry.outcome === "done") {
    await showResult(entry);
    return;
  }
  await showPictures(isOfFile ? page.fileUrl : ownFile(address), null, LOCAL_ONLY);
  if (entry.outcome === "running") {
    const watch = { entry, abort: new AbortController(), started: entry.at };
    begun(watch);
    phase("Asking the server");
    follow(watch).catch((error) => ended(watch, error));
  } else if (entry.message) {
    showFaults(Object.assign(new Error(entry.message), { faults: entry.faults }));
  }
}

// -- the same call in code -------------------------------------------------------------------------------------------

function showCall() {
  if (!page.form) return;
  const input = page.form.changed();
  const field = page.form.picture;
  const { [field]: url = null, ...rest } = input;
  const call = { origin: origin(), endpoint: page.endpoint, input: rest, field, file: page.file, url, needsKey: !page.facts.is_open };
  find("#call code").textContent = LANGUAGES[page.language].write(call);
  find("#call-note").textContent = LANGUAGES[page.language].note(call);
}

function makeTabs() {
  const names = Object.keys(LANGUAGES);
  const tabs = names.map((name) => make("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "call",
    on: { click: () => pick(name), keydown: (event) => turn(event, name) },
  }, LANGUAGES[name].title));
  const pick = (name) => {
    page.language = name;
    tabs.forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(names[index] === name));
      tab.tabIndex = names[index] === name ? 0 : -1;
    });
    find("#call").setAttribute("aria-labelledby", `tab-${name}`);
    showCall();
  };
  const turn = (event, name) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = names[(names.indexOf(name) + step + names.length) % names.length];
    pick(next);
    find(`#tab-${next}`).focus();
  };
  find("[role=tablist]").append(...tabs);
  pick(page.language);
}

async function copy() {
  const code = find("#call code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Browsers give the clipboard to pages over HTTPS or of this machine only; the older way works elsewhere.
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  find("#copy").textContent = "Copied";
  setTimeout(() => { find("#copy").textContent = "Copy"; }, 1500);
}

// -- wiring ----------------------------------------------------------------------------------------------------------

function listen() {
  const input = find("#file");
  input.addEventListener("change", () => input.files[0] && chooseFile(input.files[0]));
  find("#replace").addEventListener("click", () => { input.value = ""; input.click(); });
  find("#form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  find("#cancel").addEventListener("click", cancel);
  find("#reset").addEventListener("click", () => {
    const { [page.form.picture]: picture } = page.form.changed();
    page.form.fill({ [page.form.picture]: picture });
  });
  find("#endpoint").addEventListener("change", (event) => choose(event.target.value).catch(showFaults));
  find("#copy").addEventListener("click", copy);
  find("#clear").addEventListener("click", () => { history.clear(); showHistory(); });
  const zooms = { in: () => comparison.zoomBy(1.5), out: () => comparison.zoomBy(1 / 1.5), fit: () => comparison.fit(), full: () => comparison.full() };
  for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", zooms[button.dataset.zoom]);
  listenForPictures();
  listenForKey();
}

function listenForPictures() {
  const isWelcome = (event) => ["Files", "text/uri-list"].some((type) => event.dataTransfer?.types.includes(type));
  document.addEventListener("dragover", (event) => {
    if (!isWelcome(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const end of ["dragleave", "drop", "dragend"]) {
    document.addEventListener(end, (event) => (event.relatedTarget === null || end !== "dragleave") && document.body.classList.remove("dropping"));
  }
  document.addEventListener("drop", (event) => {
    if (!page.form || !isWelcome(event)) return;
    event.preventDefault();
    take(event.dataTransfer, event.dataTransfer.getData("text/uri-list"));
  });
  document.addEventListener("paste", (event) => {
    if (!page.form) return;
    const isTyping = event.target.closest?.("input, textarea") !== null;
    take(event.clipboardData, isTyping ? "" : event.clipboardData.getData("text/plain"));
  });
}

/** The first file that was dropped or pasted, or the address. */
function take(data, address) {
  const [file] = data.files;
  if (file) chooseFile(file);
  else if (/^https?:\/\/\S+$/.test(address.trim())) chooseAddress(address.trim());
}

function listenForKey() {
  const input = find("#key-input");
  const keep = (key) => {
    client.key = input.value = key;
    try {
      if (key) localStorage.setItem(KEY_PLACE, key);
      else localStorage.removeItem(KEY_PLACE);
    } catch {
      /* it is then asked for again */
    }
  };
  try {
    client.key = input.value = localStorage.getItem(KEY_PLACE) ?? "";
  } catch {
    /* likewise */
  }
  input.addEventListener("input", () => { find("#key-fault").textContent = ""; keep(input.value.trim()); });
  find("#key-forget").addEventListener("click", () => keep(""));
}

/** When the page was painted as it came; a page in the background is not, and need not be. */
const painted = () => new Promise((resolve) => {
  requestAnimationFrame(() => setTimeout(resolve));
  setTimeout(resolve, UNSEEN_MS);
});

await painted();
listen();
makeTabs();
showHistory();
await readFacts();
