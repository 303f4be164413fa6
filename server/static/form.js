/**
 * Controls from an endpoint's OpenAPI document: one per property of its input, whatever the endpoint is.
 *
 * A value that equals the default is not sent. Nothing is corrected here: the server says what is wrong, and the form
 * shows it at the field.
 */

import { find, inWords, make } from "./elements.js";

const LONG_TEXT = 40;
const FEW_OPTIONS = 3;
const MAX_SLIDER_STEPS = 1000;

/** The input schema of an endpoint in its document, and the same for its output. */
export function schemasOf(document, endpoint) {
  const path = document.paths[`/${endpoint}`].post;
  const result = Object.values(document.paths).find((operations) => operations.get && !operations.get.parameters?.[1]);
  const resolve = (schema) => resolved(schema, document);
  return {
    input: resolve(path.requestBody.content["application/json"].schema),
    output: resolve(result.get.responses["200"].content["application/json"].schema),
    resolve,
  };
}

/** A schema with what it refers to put in place. */
function resolved(schema, document) {
  if (schema.$ref) {
    const target = schema.$ref.slice(2).split("/").reduce((place, name) => place[name], document);
    return { ...resolved(target, document), ...without(schema, "$ref") };
  }
  if (schema.allOf?.length === 1) return { ...resolved(schema.allOf[0], document), ...without(schema, "allOf") };
  return schema;
}

function without(schema, name) {
  const { [name]: _, ...rest } = schema;
  return rest;
}

/** The property that takes the picture. */
export function pictureField(input) {
  const names = Object.keys(input.properties);
  const required = names.filter((name) => input.required?.includes(name) && input.properties[name].type === "string");
  return required.find((name) => name.endsWith("image_url")) ?? required.find((name) => name.endsWith("_url")) ?? null;
}

export class Form {
  /** Fields in the document's order; `onChange` is told of every edit. */
  constructor(container, { input, resolve }, onChange) {
    this.picture = pictureField(input);
    this.#container = container;
    this.#onChange = onChange;
    const order = input["x-fal-order-properties"] ?? Object.keys(input.properties);
    this.#fields = new Map();
    for (const name of order) {
      const schema = resolve(input.properties[name]);
      this.#fields.set(name, makeField(name, schema, input.required?.includes(name) ?? false, () => this.#edited(name)));
    }
    this.#arrange();
  }

  #container;
  #onChange;
  #fields;

  has(name) {
    return this.#fields.has(name);
  }

  /** The values that differ from their defaults, as they are sent. */
  changed() {
    const values = {};
    for (const [name, field] of this.#fields) {
      const value = field.read();
      if (value !== undefined && JSON.stringify(value) !== JSON.stringify(field.schema.default)) values[name] = value;
    }
    return values;
  }

  /** Set these values, and all others to their defaults. */
  fill(values) {
    for (const [name, field] of this.#fields) this.set(name, values[name] ?? field.schema.default, false);
    this.clearFaults();
    this.#onChange();
  }

  set(name, value, tell = true) {
    const field = this.#fields.get(name);
    field?.write(value);
    field?.mark();
    if (tell) this.#onChange();
  }

  /** Names of fields whose text cannot be sent at all, such as letters for a number. */
  unreadable() {
    return [...this.#fields].filter(([, field]) => field.isUnreadable()).map(([name]) => name);
  }

  /** Show a fault at a field; false if there is no such field. */
  showFault(name, message) {
    const field = this.#fields.get(name);
    if (!field) return false;
    field.fault(message);
    field.element.closest("details")?.setAttribute("open", "");
    return true;
  }

  clearFaults() {
    for (const field of this.#fields.values()) field.fault("");
  }

  /** Move to the first field with a fault; returns how many fields have one. */
  focusFault() {
    const faulty = new Set([...this.#container.querySelectorAll("[aria-invalid=true]")].map((input) => input.closest(".field")));
    find("[aria-invalid=true]", this.#container)?.focus();
    return faulty.size;
  }

  #edited(name) {
    const field = this.#fields.get(name);
    field.fault("");
    field.mark();
    this.#onChange();
  }

  /** The picture, then what one reaches for first, the rest folded away. */
  #arrange() {
    const isPicture = ([name]) => (name === this.picture ? 0 : 1);
    const all = [...this.#fields.entries()].sort((one, other) => isPicture(one) - isPicture(other));
    const firstText = all.find(([name, field]) => field.kind === "text" && name !== this.picture)?.[0];
    const isMain = ([name, field]) =>
      name === this.picture || name === firstText || field.kind === "range" || field.kind === "options";
    const folded = all.filter((entry) => !isMain(entry)).map(([, field]) => field.element);
    const rest = folded.length ? make("details", {}, make("summary", {}, "More parameters"), ...folded) : null;
    this.#container.replaceChildren(...all.filter(isMain).map(([, field]) => field.element), ...(rest ? [rest] : []));
    for (const field of this.#fields.values()) {
      field.write(field.schema.default);
      field.mark();
    }
  }
}

/** Label, control, description, range and default, and room for a fault. */
function makeField(name, schema, isRequired, onEdit) {
  const id = `field-${name}`;
  const fault = make("p", { class: "fault", id: `${id}-fault` });
  const help = make("p", { class: "help", id: `${id}-help` }, describe(schema));
  const common = { id, name, describedBy: `${id}-help ${id}-fault`, label: inWords(name, schema.description), isRequired, onEdit };
  const control = controlOf(name, schema)(schema, common);
  const reset = make("button", {
    type: "button", class: "reset", hidden: true, title: `Back to the default`, "aria-label": `${common.label}: back to the default`,
    on: { click: () => { control.write(schema.default); onEdit(); } },
  }, "reset");
  const head = make("div", { class: "head" }, control.title ?? make("label", { for: id }, common.label), reset, control.value ?? null);
  const element = make("div", { class: `field ${control.kind}`, data: { name }, role: control.role, "aria-labelledby": control.labelledBy }, head, control.element, fault, help);
  const isDefault = () => {
    const value = control.read();
    return JSON.stringify(value ?? null) === JSON.stringify(schema.default ?? null);
  };
  return {
    schema,
    element,
    kind: control.kind,
    read: control.read,
    write: control.write,
    isUnreadable: control.isUnreadable ?? (() => false),
    mark: () => { reset.hidden = isDefault() || schema.default === undefined; },
    fault: (message) => {
      fault.textContent = message;
      for (const input of element.querySelectorAll("input, select, textarea")) {
        if (message) input.setAttribute("aria-invalid", "true");
        else input.removeAttribute("aria-invalid");
      }
    },
  };
}

/** The description with range and default after it. */
function describe(schema) {
  const text = [schema.description, schema["x-hint"]].filter(Boolean).join(". ").replace(/\s+/g, " ").trim();
  const facts = [];
  const { minimum, maximum } = schema;
  if (minimum !== undefined && maximum !== undefined) facts.push(`${minimum} to ${maximum}`);
  else if (minimum !== undefined) facts.push(`at least ${minimum}`);
  else if (maximum !== undefined) facts.push(`at most ${maximum}`);
  const isNumber = schema.type === "number" || schema.type === "integer";
  if (isNumber && schema.default !== undefined && !/\bdefault\b/i.test(text)) facts.push(`default ${schema.default}`);
  const end = facts.length ? facts.join(", ") : "";
  return end ? `${text}${text && !/[.!?)]$/.test(text) ? "." : ""} ${end.charAt(0).toUpperCase() + end.slice(1)}.`.trim() : text;
}

/** Which kind of control suits a schema. */
function controlOf(name, schema) {
  if (schema.enum) return schema.enum.length <= FEW_OPTIONS ? radios : select;
  if (schema.type === "boolean") return checkbox;
  if (schema.type === "integer" || schema.type === "number") {
    return schema.minimum !== undefined && schema.maximum !== undefined ? range : number;
  }
  if (schema.type === "string") return name.endsWith("_url") || schema.format === "uri" ? url : text;
  return json;
}

const named = ({ id, name, describedBy, isRequired }) => ({ id, name, required: isRequired, "aria-describedby": describedBy });
const heard = ({ onEdit }) => ({ on: { input: onEdit } });

function select(schema, common) {
  const options = schema.enum.map((option, index) => make("option", { value: index }, String(option)));
  const element = make("select", { ...named(common), ...heard(common) }, ...options);
  return {
    kind: "options",
    element,
    read: () => schema.enum[element.value],
    write: (value) => { element.value = Math.max(0, schema.enum.indexOf(value)); },
  };
}

function radios(schema, common) {
  const titleId = `${common.id}-title`;
  const inputs = schema.enum.map((_, index) =>
    make("input", { type: "radio", name: common.name, id: index ? `${common.id}-${index}` : common.id, ...heard(common) }));
  const labels = inputs.map((input, index) => make("label", {}, input, make("span", {}, String(schema.enum[index]))));
  return {
    kind: "options",
    role: "radiogroup",
    labelledBy: titleId,
    title: make("span", { id: titleId, class: "title" }, common.label),
    element: make("div", { class: "segments" }, ...labels),
    read: () => schema.enum[inputs.findIndex((input) => input.checked)],
    write: (value) => inputs.forEach((input, index) => { input.checked = schema.enum[index] === value; }),
  };
}

function checkbox(schema, common) {
  const element = make("input", { type: "checkbox", class: "switch", ...named(common), required: false, ...heard(common) });
  return { kind: "flag", element: make("span"), value: element, read: () => element.checked, write: (value) => { element.checked = value === true; } };
}

/** A number as one types it. */
function numberInput(schema, attributes) {
  return make("input", {
    type: "number", min: schema.minimum, max: schema.maximum, step: schema.type === "integer" ? 1 : "any",
    inputMode: schema.type === "integer" ? "numeric" : "decimal", ...attributes,
  });
}

/** A typed number; whole ones beyond what JavaScript counts exactly stay as they are written. */
const readNumber = (input) => (input.value === "" ? undefined : Number(input.value));

function number(schema, common) {
  const element = numberInput(schema, { ...named(common), ...heard(common), placeholder: schema.nullable ? "automatic" : "" });
  return {
    kind: "number",
    element,
    read: () => readNumber(element),
    write: (value) => { element.value = value ?? ""; },
    isUnreadable: () => element.validity.badInput,
  };
}

function range(schema, common) {
  const { minimum, maximum } = schema;
  const span = (maximum - minimum) / 50;
  const step = schema.type === "integer" ? Math.max(1, Math.ceil((maximum - minimum) / MAX_SLIDER_STEPS)) : 10 ** Math.floor(Math.log10(span));
  const value = numberInput(schema, {
    ...named(common), on: { input: () => { slider.value = value.value; paint(); common.onEdit(); } },
  });
  const slider = make("input", {
    type: "range", min: minimum, max: maximum, step, "aria-label": `${common.label}, slider`, tabIndex: 0,
    on: { input: () => { value.value = slider.value; paint(); common.onEdit(); } },
  });
  const paint = () => slider.style.setProperty("--part", `${(100 * (slider.value - minimum)) / (maximum - minimum)}%`);
  return {
    kind: "range",
    element: slider,
    value,
    read: () => readNumber(value),
    write: (given) => { value.value = given ?? ""; slider.value = given ?? minimum; paint(); },
    isUnreadable: () => value.validity.badInput,
  };
}

function url(schema, common) {
  const element = make("input", { type: "url", inputMode: "url", placeholder: "https://…", spellcheck: false, ...named(common), ...heard(common) });
  return { kind: "address", element, read: () => element.value.trim() || undefined, write: (value) => { element.value = value ?? ""; } };
}

function text(schema, common) {
  const element = make("textarea", { rows: (schema.default ?? "").length > LONG_TEXT ? 3 : 2, ...named(common), ...heard(common) });
  const isOptional = schema.default === undefined;
  return {
    kind: "text",
    element,
    read: () => (element.value === "" && isOptional ? undefined : element.value),
    write: (value) => { element.value = value ?? ""; },
  };
}

/** Lists and objects, as JSON. */
function json(schema, common) {
  const element = make("textarea", { rows: 3, class: "mono", spellcheck: false, ...named(common), ...heard(common) });
  const parse = () => {
    try {
      return { value: element.value.trim() === "" ? undefined : JSON.parse(element.value) };
    } catch {
      return { isUnreadable: true };
    }
  };
  return {
    kind: "json",
    element,
    read: () => parse().value,
    write: (value) => { element.value = value === undefined || value === null ? "" : JSON.stringify(value, null, 2); },
    isUnreadable: () => parse().isUnreadable === true,
  };
}
