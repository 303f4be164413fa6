/** One's own requests, kept in this browser: what was asked, what came of it, and a small picture. */

const PLACE = "creative-upscaler.requests";
const MAX_REQUESTS = 40;
const THUMBNAIL_PX = 112;

export class History {
  /** The newest first; `{id, endpoint, at, input, field, name, outcome, width, height, result, thumbnail}`. */
  requests = [];

  constructor() {
    try {
      const kept = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
      this.requests = Array.isArray(kept) ? kept.filter((entry) => typeof entry?.id === "string" && typeof entry?.endpoint === "string") : [];
    } catch {
      this.requests = [];
    }
  }

  add(entry) {
    this.requests = [entry, ...this.requests].slice(0, MAX_REQUESTS);
    this.#keep();
    return entry;
  }

  update(entry, facts) {
    Object.assign(entry, facts);
    this.#keep();
  }

  remove(entry) {
    this.requests = this.requests.filter((other) => other !== entry);
    this.#keep();
  }

  clear() {
    this.requests = [];
    this.#keep();
  }

  /** Keep what there is room for; a browser that keeps nothing is no reason to stop. */
  #keep() {
    for (let count = this.requests.length; count >= 0; count = Math.floor(count / 2)) {
      try {
        localStorage.setItem(PLACE, JSON.stringify(this.requests.slice(0, count)));
        return;
      } catch {
        if (count === 0) return;
      }
    }
  }
}

/** A picture as a small data URI; null if it cannot be drawn. */
export async function thumbnail(url) {
  try {
    const image = new Image();
    image.crossOrigin = "anonymous";
    image.src = url;
    await image.decode();
    const scale = THUMBNAIL_PX / Math.max(image.naturalWidth, image.naturalHeight);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/webp", 0.7);
  } catch {
    return null;
  }
}
