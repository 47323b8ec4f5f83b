const report = JSON.parse(document.getElementById("report-data").textContent);
// The namespace is read from the page's own drawing, so that the file holds no address at all.
const svgNamespace = document.querySelector("svg").namespaceURI;

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(svgNamespace, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function short(value) {
  if (value === 0) return "0";
  for (const [size, unit] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}\u2009${unit}`;
  return `${+value.toPrecision(3)}`;
}

function duration(seconds) {
  if (seconds < 100) return `${+seconds.toFixed(1)}\u2009s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

// About `count` round numbers within [low, high]; `steps` are the round sizes within one power of `base`.
function ticks(low, high, count, base = 10, steps = [1, 2, 5, 10]) {
  const rough = (high - low) / count || 1;
  const power = base ** Math.floor(Math.log(rough) / Math.log(base));
  const step = power * (steps.find((size) => size * power >= rough * 0.999) ?? base);
  const marks = [];
  for (let mark = Math.ceil(low / step - 1e-9); mark * step <= high + step * 1e-9; mark += 1) marks.push(mark * step);
  return marks;
}

const secondTicks = (low, high, count) =>
  high - low < 60 ? ticks(low, high, count) : ticks(low, high, count, 60, [1, 2, 5, 10, 15, 30, 60]);

// A group of radio buttons that looks like a segmented switch. `choose` gets the index.
function choices(box, names, describe, choose, start = 0) {
  const group = `choice-${choices.count = (choices.count || 0) + 1}`;
  const inputs = names.map((name, index) => {
    const input = html("input", { type: "radio", name: group, "aria-label": describe(name) });
    input.checked = index === start;
    input.addEventListener("change", () => choose(index));
    box.append(html("label", {}, input, html("span", {}, name)));
    return input;
  });
  return (index) => { inputs[index].checked = true; };
}

// Draws again whenever the box gets another width.
function onWidth(box, draw) {
  let width = 0;
  const look = () => {
    const now = Math.floor(box.clientWidth);
    if (now > 0 && now !== width) draw(width = now);
  };
  new ResizeObserver(look).observe(box);
  look();
  return () => { if (width) draw(width); };
}

// Eleven classes on a logarithmic scale from a quarter to four times the fair share.
const heatClasses = 11;
function heatClass(relative) {
  if (relative <= 0) return 0;
  const position = Math.max(-1, Math.min(1, Math.log2(relative) / 2));
  return Math.round((position + 1) / 2 * (heatClasses - 1));
}

for (const legend of document.querySelectorAll(".legend")) {
  legend.append(html("em", {}, "less"));
  const names = { 0: "¼", 2: "0.4", 5: "1 ×", 8: "2.3", 10: "4 ×" };
  for (let index = 0; index < heatClasses; index += 1)
    legend.append(html("span", { class: `heat-${index}` }, names[index] || "\u00a0"));
  legend.append(html("em", {}, "more"));
}
