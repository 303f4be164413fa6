/** Elements, made without markup: text from anywhere stays text. */

/** `document.querySelector`, for elements that the page is known to have. */
export const find = (selector, root = document) => root.querySelector(selector);

/**
 * An element with properties and children.
 *
 * @param {string} tag
 * @param {Object} properties  `class`, `data` (an object), `on` (listeners by event), names with a hyphen are attributes,
 *     all others properties of the element
 * @param {...(Node|string|null)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name.includes("-") || name === "role" || name === "for" || name === "list") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A name of the API in words: `num_inference_steps` is "Num inference steps"; capitals as a description writes them. */
export function inWords(name, description = "") {
  const capitals = [...(description.match(/\b[A-Z]{2,}\b/g) ?? []), "URL"];
  const words = name.split("_").map((word) => capitals.find((one) => one.toLowerCase() === word) ?? word).join(" ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** A number of bytes for people. */
export function inBytes(size) {
  return size < 1e6 ? `${Math.max(1, Math.round(size / 1e3))} KB` : `${(size / 1e6).toFixed(size < 1e7 ? 1 : 0)} MB`;
}

/** Seconds as `8 s` or `2:05`. */
export function inTime(seconds) {
  const whole = Math.floor(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
