// The colours of experts, and of the page.

// Steps of the golden angle: experts with near numbers get distant hues, however many there are.
export const hue = (expert) => Math.round((expert * 137.508 + 262) % 360);
const lift = (expert) => Math.floor(expert / 3) % 3 - 1;

export function paint(element, expert) {
  element.style.setProperty("--hue", `${hue(expert)}`);
  element.style.setProperty("--lift", `${lift(expert)}`);
}

export const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);

export const solid = (expert, dark) => `oklch(${(dark ? 0.72 : 0.64) + lift(expert) * 0.04} ${dark ? 0.12 : 0.14} ${hue(expert)})`;

// What a variable of the style sheet is now, as a colour that a canvas reads.
export function resolved(name) {
  const probe = document.createElement("span");
  probe.hidden = true;
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

// A canvas of so many CSS pixels, sharp on every screen, and empty.
export function fit(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

// Draws again whenever the box gets another width.
export function onWidth(box, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(box.clientWidth);
    if (now > 0 && now !== width) draw(width = now);
  }).observe(box);
}

export function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}
