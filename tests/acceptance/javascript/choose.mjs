/**
 * A person chooses a file in a page, which hands it to the `upscale` of a module; prints what that returns.
 *
 *   node choose.mjs CHROMIUM FOLDER MODULE FILE
 */

import { openPage } from "./page.mjs";

const [chromium, folder, module, file] = process.argv.slice(2);
const contents = `import { upscale } from "./${module}"; globalThis.upscale = upscale;`;
const { page, close } = await openPage(chromium, contents, folder);
await page.setContent('<input type="file">');
await page.setInputFiles("input", file);
const url = await page.evaluate(() => globalThis.upscale(document.querySelector("input").files[0]));
process.stdout.write(`${url}\n`);
await close();
