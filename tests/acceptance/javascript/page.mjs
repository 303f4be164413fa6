/** A page in Chromium that has fal's client in it, bundled as web applications bundle it. */

import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { build } from "esbuild";
import { chromium } from "playwright-core";

export const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-dev-shm-usage",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
];

const PERFORM = 'import { perform } from "./verbs.mjs"; globalThis.perform = perform;';

/** A page of its own origin, after the `contents` of a module ran in it. */
export async function openPage(executablePath, contents = PERFORM, resolveDir = import.meta.dirname) {
  const html = await readFile(new URL("page.html", import.meta.url));
  const bundle = await build({
    stdin: { contents, resolveDir },
    bundle: true,
    format: "esm",
    write: false,
  });
  const files = {
    "/": ["text/html", html],
    "/bundle.js": ["text/javascript", bundle.outputFiles[0].contents],
  };
  const listener = createServer((request, response) => {
    const [type, body] = files[request.url] ?? [];
    response.writeHead(body ? 200 : 404, body ? { "Content-Type": type } : {}).end(body);
  });
  await new Promise((resolve) => listener.listen(0, "127.0.0.1", resolve));

  const profile = await mkdtemp(join(tmpdir(), "upscaler-chromium-"));
  const browser = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args: FLAGS });
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${listener.address().port}/`);
  await page.waitForLoadState("load"); // modules have run by then
  return {
    page,
    perform: (text) => page.evaluate((message) => globalThis.perform(message), text),
    close: async () => {
      await browser.close();
      listener.close();
      listener.closeAllConnections();
      await rm(profile, { recursive: true, force: true });
    },
  };
}
