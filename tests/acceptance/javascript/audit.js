/**
 * What is wrong with a page for those who see little, hear it, or hold it in one hand: texts of too little contrast,
 * controls without a name, things wider than the screen, targets too small. Gives a list of sentences.
 */
(() => {
  const CONTRAST = 4.5; // WCAG 2.2, 1.4.3
  const TARGET_PX = 24; // 2.5.8
  const faults = [];
  const name = (element) => `${element.tagName.toLowerCase()}${element.id && `#${element.id}`} "${(element.textContent || element.value || "").trim().slice(0, 30)}"`;
  const isSeen = (element) => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && box.width > 1 && box.height > 1;
  };

  // -- contrast
  const parse = (text) => {
    const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
    return { red, green, blue, alpha };
  };
  const over = (top, below) => ({
    red: top.red * top.alpha + below.red * (1 - top.alpha),
    green: top.green * top.alpha + below.green * (1 - top.alpha),
    blue: top.blue * top.alpha + below.blue * (1 - top.alpha),
    alpha: 1,
  });
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const layer = parse(getComputedStyle(at).backgroundColor);
      if (layer.alpha > 0) layers.push(layer);
      if (layer.alpha === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), { red: 255, green: 255, blue: 255, alpha: 1 });
  };
  const luminance = ({ red, green, blue }) => {
    const [r, g, b] = [red, green, blue].map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element, pseudo) => {
    const below = ground(element);
    const ink = over(parse(getComputedStyle(element, pseudo).color), below);
    const [light, dark] = [luminance(ink), luminance(below)].sort((one, other) => other - one);
    return (light + 0.05) / (dark + 0.05);
  };
  const check = (element, pseudo) => {
    const ratio = contrast(element, pseudo);
    if (ratio < CONTRAST) faults.push(`contrast ${ratio.toFixed(2)}: ${name(element)}${pseudo ?? ""}`);
  };
  let texts = 0;
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const isField = element.matches("select, textarea, input:not([type=range], [type=checkbox], [type=radio], [type=file])");
    if (!(hasText || isField) || !isSeen(element) || element.closest(".covered, .skip, option")) continue;
    texts += 1;
    check(element);
    if (element.placeholder) check(element, "::placeholder");
  }
  if (texts < 20) faults.push(`only ${texts} texts are seen`);

  // -- names
  for (const element of document.querySelectorAll("button, a[href], input, select, textarea, progress, [role]")) {
    if (!element.checkVisibility()) continue;
    const reference = element.getAttribute("aria-labelledby");
    const label = element.getAttribute("aria-label") || (reference && document.getElementById(reference)?.textContent)
      || [...(element.labels ?? [])].map((one) => one.textContent).join("")
      || (element.matches("button, a, [role=tab], [role=status], [role=alert]") && (element.textContent || element.matches("[role=status], [role=alert]")));
    if (!label) faults.push(`no name: ${name(element)}`);
    for (const id of (element.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean)) {
      if (!document.getElementById(id)) faults.push(`described by nothing: ${name(element)} ${id}`);
    }
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids.filter((one, index) => ids.indexOf(one) !== index))) faults.push(`two elements are #${id}`);

  // -- size
  const { scrollWidth, clientWidth } = document.documentElement;
  if (scrollWidth > clientWidth) faults.push(`the page is ${scrollWidth} px wide on ${clientWidth}`);
  for (const element of document.querySelectorAll("button, a.button, select, textarea, input:not(.covered, .split, [type=radio]), summary")) {
    const { width, height } = element.getBoundingClientRect();
    if (isSeen(element) && Math.min(width, height) < TARGET_PX) faults.push(`small target ${width.toFixed(0)} x ${height.toFixed(0)}: ${name(element)}`);
  }
  return faults;
})();
