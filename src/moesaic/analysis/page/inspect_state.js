// What is chosen, and who draws it. Every picture shows the same layer and expert.
const layers = report.layers, labels = report.labels;
const chosen = { layer: 0, expert: 0, label: labels[0].name, listeners: [] };
const expertsOf = (layer) => layers[layer].load.length;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u2009%`;
const times = (value) => value === null ? "never" : `${value >= 10 ? value.toFixed(0) : value.toFixed(2)}\u2009×`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const shown = (text) => text === "" ? "␀" : text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
const byId = (id) => document.getElementById(id);

function choose(layer, expert, options = {}) {
  chosen.layer = clamp(layer, 0, layers.length - 1);
  chosen.expert = clamp(expert, 0, expertsOf(chosen.layer) - 1);
  for (const listener of chosen.listeners) listener();
  // A page in a frame or from a file may not write its address.
  try { history.replaceState(null, "", `#${chosen.layer}.${chosen.expert}`); } catch { /* the choice is not kept */ }
  if (options.show) byId(options.show).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

// Steps of the golden angle: experts with near numbers get distant hues, however many there are.
const hueOf = (expert) => Math.round((expert * 137.508 + 262) % 360);
const domainTile = (index) => `--tile: var(--d${index % 8})`;

// Use of each expert by each value of a label, relative to its use by all tokens; null where there is nothing to say.
const relativeCache = new Map();
function relativeUse(layer, name) {
  const key = `${layer} ${name}`;
  if (!relativeCache.has(key)) {
    const counts = layers[layer].counts[name], load = layers[layer].load, total = sum(load);
    relativeCache.set(key, counts.map((row) => {
      const all = sum(row);
      return row.map((count, expert) => load[expert] && all ? (count / all) / (load[expert] / total) : null);
    }));
  }
  return relativeCache.get(key);
}

// The value of a label that uses an expert most. Values with hardly any token are noise and do not count.
function favouriteOf(layer, expert, name) {
  const counts = layers[layer].counts[name], total = sum(layers[layer].load);
  let best = { value: -1, relative: 0 };
  relativeUse(layer, name).forEach((row, value) => {
    if ((row[expert] ?? 0) > best.relative && sum(counts[value]) > 0.005 * total) best = { value, relative: row[expert] };
  });
  return best;
}

// The expert that leans furthest to one side, for much of its layer's work.
function mostOneSided() {
  const name = labels.find(({ values }) => values.length > 1)?.name;
  let best = { layer: 0, expert: 0, score: -1, name, value: -1 };
  if (name) layers.forEach(({ load }, layer) => load.forEach((rows, expert) => {
    const { value, relative } = favouriteOf(layer, expert, name), score = rows * Math.log(Math.max(1, relative)) / Math.max(1, sum(load));
    if (score > best.score) best = { layer, expert, score, name, value };
  }));
  return best;
}

// Matrices of experts by experts: a byte a cell, 0 for nothing, else -1 to 1.
const cellCache = new Map();
function cellsOf(layer, name) {
  const key = `${layer} ${name}`, packed = layers[layer][name];
  if (!packed) return null;
  if (!cellCache.has(key)) cellCache.set(key, Uint8Array.from(atob(packed), (character) => character.charCodeAt(0)));
  return cellCache.get(key);
}
const cellValue = (cell) => cell === 0 ? null : (cell - 128) / 127;

function expertButton(layer, expert, note = "") {
  const button = html("button", { type: "button", class: "expert-link", style: `--hue: ${hueOf(expert)}` }, `${layer}.${expert}`);
  if (note) button.append(html("small", {}, ` ${note}`));
  button.setAttribute("aria-label", `Layer ${layer}, expert ${expert}${note ? `, ${note}` : ""}`);
  button.addEventListener("click", () => choose(layer, expert, { show: "expert" }));
  return button;
}

function facts(box, entries) {
  box.replaceChildren(...entries.flatMap(([name, value, says]) => {
    const told = html("dd", {}, value);
    if (says) told.append(html("small", {}, ` ${says}`));
    return [html("div", {}, html("dt", {}, name), told)];
  }));
}

// Arrow keys for something that has rows and columns.
function arrows(box, move, enter) {
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) move(...step);
    else if (event.key === "Enter" || event.key === " ") enter();
    else return;
    event.preventDefault();
  });
}

function setUpPicker() {
  const layerBox = byId("pick-layer"), expertBox = byId("pick-expert");
  layerBox.append(...layers.map((_, layer) => html("option", { value: layer }, `${layer}`)));
  layerBox.addEventListener("change", () => choose(+layerBox.value, chosen.expert));
  expertBox.addEventListener("change", () => choose(chosen.layer, +expertBox.value));
  let optionsFor = -1;
  chosen.listeners.push(() => {
    if (optionsFor !== expertsOf(chosen.layer)) {
      optionsFor = expertsOf(chosen.layer);
      expertBox.replaceChildren(...Array.from({ length: optionsFor }, (_, expert) => html("option", { value: expert }, `${expert}`)));
    }
    layerBox.value = chosen.layer;
    expertBox.value = chosen.expert;
    const tokens = layers[chosen.layer].typical[chosen.expert].slice(0, 4).map((token) => shown(token.text));
    byId("picked").replaceChildren(...(tokens.length ? tokens.map((text) => html("code", {}, text)) : ["no favourite token"]));
  });
}
setUpPicker();
