/** The call that the form would make, as a program: curl, Python and JavaScript, each ready to run. */

const FILE_NAME = /[^A-Za-z0-9._ -]/g;

/**
 * @param {Object} call
 * @param {string} call.origin  this server, without a final slash
 * @param {string} call.endpoint
 * @param {Object} call.input  without the picture
 * @param {string} call.field  the property that takes the picture
 * @param {{name: string, type: string}|null} call.file  a picture of one's own disk
 * @param {string|null} call.url  or its address
 * @param {boolean} call.needsKey
 */
export const LANGUAGES = {
  curl: {
    title: "curl",
    note: ({ needsKey }) => (needsKey ? "FAL_KEY holds your API key." : ""),
    write: curl,
  },
  python: {
    title: "Python",
    note: () => 'pip install fal-client; eval "$(creative-upscaler env)" points it at this server.',
    write: python,
  },
  javascript: {
    title: "JavaScript",
    note: () => "npm install @fal-ai/client",
    write: javascript,
  },
};

const fileName = (file) => (file.name || "picture.png").replace(FILE_NAME, "_").replace(/^-/, "_");
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl({ origin, endpoint, input, field, file, url, needsKey }) {
  const key = needsKey ? '     -H "Authorization: Key $FAL_KEY" \\\n' : "";
  const head = `curl ${origin}/${endpoint} \\\n${key}     -H "Content-Type: application/json" \\\n`;
  if (!file) return `${head}     -d ${quoted(JSON.stringify({ [field]: url ?? "https://…", ...input }, null, 2))}`;
  const rest = JSON.stringify(input, null, 2).slice(1, -1).trimEnd();
  const before = quoted(`{${rest && `${rest},`}\n  "${field}": "data:${file.type || "image/png"};base64,`);
  return `printf %s ${before} \\\n  "$(base64 < ${quoted(fileName(file))} | tr -d '\\n')" '"}' |\n${head}     -d @-`;
}

function python({ endpoint, input, field, file, url }) {
  const picture = file ? `fal_client.encode_file(${pythonText(fileName(file))})` : pythonText(url ?? "https://…");
  const lines = Object.entries(input).map(([name, value]) => `        ${pythonText(name)}: ${pythonValue(value)},\n`);
  return `import fal_client

result = fal_client.subscribe(
    "${endpoint}",
    arguments={
        ${pythonText(field)}: ${picture},
${lines.join("")}    },
)
print(result)`;
}

/** A JSON string is a Python string as well. */
const pythonText = (text) => JSON.stringify(text);

function pythonValue(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, member]) => `${pythonText(name)}: ${pythonValue(member)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function javascript({ origin, endpoint, input, field, file, url, needsKey }) {
  const name = file && JSON.stringify(fileName(file));
  const picture = file ? `new Blob([await readFile(${name})], { type: ${JSON.stringify(file.type || "image/png")} })` : JSON.stringify(url ?? "https://…");
  const lines = Object.entries(input).map(([key, value]) => `    ${/^\w+$/.test(key) ? key : JSON.stringify(key)}: ${JSON.stringify(value)},\n`);
  const key = needsKey ? "process.env.FAL_KEY" : '"none"';
  return `${file ? 'import { readFile } from "node:fs/promises";\n' : ""}import { fal } from "@fal-ai/client";

fal.config({ credentials: ${key}, proxyUrl: { url: "${origin}/api/fal/proxy", when: "always" } });

const { data } = await fal.subscribe("${endpoint}", {
  input: {
    ${field}: ${picture},
${lines.join("")}  },
});
console.log(data);`;
}
