/**
 * Performs a message per line of standard input, and prints a line with the answer; `ready` comes first.
 *
 *   node driver.mjs node
 *   node driver.mjs chained URL      with fal's own proxy, under Express, in front of the server at URL
 *   node driver.mjs page CHROMIUM    in a page, whose origin is not the server's
 *   node driver.mjs playground CHROMIUM    in the server's own page, by its controls
 */

import { createInterface } from "node:readline";

import { perform } from "./verbs.mjs";

const OPEN = {
  node: async () => ({ perform, close: async () => {} }),
  chained: async (base) => (await import("./chain.mjs")).openChain(base),
  page: async (chromium) => (await import("./page.mjs")).openPage(chromium),
  playground: async (chromium) => (await import("./playground.mjs")).openPlayground(chromium),
};

const [kind, argument] = process.argv.slice(2);
const place = await OPEN[kind](argument);
process.stdout.write("ready\n");
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${await place.perform(line)}\n`);
}
await place.close();
