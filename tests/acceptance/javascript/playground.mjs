/** The playground in Chromium, as a person uses it: a tab that is opened, clicked, typed into and looked at. */

import { readFile } from "node:fs/promises";

import { chromium } from "playwright-core";

import { FLAGS } from "./page.mjs";

const AUDIT = new URL("audit.js", import.meta.url);
const PATIENCE_MS = 60_000;
const POLL_MS = 20;

export async function openPlayground(executablePath) {
  const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
  const audit = await readFile(AUDIT, "utf8");
  const state = { notes: null, context: null, tab: null };

  const open = async (base, { width = 1280, height = 900, scheme = "light", path = "/", phone = false }) => {
    await state.context?.close();
    state.context = await browser.newContext({
      viewport: { width, height }, colorScheme: scheme, acceptDownloads: true, hasTouch: phone, isMobile: phone,
      permissions: ["clipboard-read", "clipboard-write"],
    });
    state.tab = await state.context.newPage();
    state.tab.setDefaultTimeout(PATIENCE_MS);
    state.notes = { console: [], requests: [], bytes: 0 };
    state.tab.on("console", (line) => ["error", "warning"].includes(line.type()) && state.notes.console.push(line.text()));
    state.tab.on("pageerror", (error) => state.notes.console.push(String(error)));
    state.tab.on("request", (request) => state.notes.requests.push(`${request.method()} ${request.url()}`));
    await state.tab.goto(base + path);
    await state.tab.waitForFunction(() => performance.getEntriesByName("usable").length > 0);
  };

  const VERBS = {
    open: (options, base) => open(base, options),
    reload: async () => {
      await state.tab.reload();
      await state.tab.waitForFunction(() => performance.getEntriesByName("usable").length > 0);
    },
    click: ({ selector }) => state.tab.click(selector),
    focus: ({ selector }) => state.tab.focus(selector),
    press: ({ keys }) => keys.reduce((before, key) => before.then(() => state.tab.keyboard.press(key)), Promise.resolve()),
    fill: ({ selector, value }) => state.tab.fill(selector, value),
    choose: ({ selector, value }) => state.tab.selectOption(selector, value),
    drag: async ({ from, to }) => {
      await state.tab.mouse.move(...from);
      await state.tab.mouse.down();
      await state.tab.mouse.move(...to, { steps: 5 });
      await state.tab.mouse.up();
    },
    wheel: async ({ at, by }) => {
      await state.tab.mouse.move(...at);
      await state.tab.mouse.wheel(0, by);
    },
    /** Drop a file on the page, or paste it. */
    hand: ({ event, name, type, base64, selector = "body" }) =>
      state.tab.evaluate(([kind, fileName, mime, text, place]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], fileName, { type: mime }));
        const init = { bubbles: true, cancelable: true };
        const target = document.querySelector(place);
        if (kind === "drop") target.dispatchEvent(new DragEvent("dragover", { ...init, dataTransfer: data }));
        target.dispatchEvent(kind === "drop" ? new DragEvent(kind, { ...init, dataTransfer: data }) : new ClipboardEvent(kind, { ...init, clipboardData: data }));
      }, [event, name, type, base64, selector]),
    pick: ({ selector, name, type, base64 }) =>
      state.tab.setInputFiles(selector, { name, mimeType: type, buffer: Buffer.from(base64, "base64") }),
    /** Wait until an expression is true in the page. */
    until: async ({ expression }) => {
      // Not waitForFunction: it would evaluate in the page, whose policy forbids that.
      const deadline = Date.now() + PATIENCE_MS;
      while (!(await state.tab.evaluate(expression))) {
        if (Date.now() > deadline) throw new Error(`never true: ${expression}`);
        await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      }
    },
    ask: ({ expression }) => state.tab.evaluate(expression),
    download: async ({ selector }) => {
      const [download] = await Promise.all([state.tab.waitForEvent("download"), state.tab.click(selector)]);
      const content = await readFile(await download.path());
      return { name: download.suggestedFilename(), base64: content.toString("base64") };
    },
    screenshot: ({ path, whole = false }) => state.tab.screenshot({ path, fullPage: whole }).then(() => path),
    /** What audit.js finds wrong with the page as it is. */
    audit: async () => state.tab.evaluate(audit),
  };

  return {
    perform: async (text) => {
      const { verb, base, options } = JSON.parse(text);
      const answer = {};
      const started = performance.now();
      try {
        answer.value = (await VERBS[verb](options, base)) ?? null;
      } catch (error) {
        answer.error = { name: error.name, message: error.message };
      }
      answer.notes = state.notes ?? {};
      answer.seconds = (performance.now() - started) / 1000;
      return JSON.stringify(answer);
    },
    close: async () => {
      await browser.close();
    },
  };
}
