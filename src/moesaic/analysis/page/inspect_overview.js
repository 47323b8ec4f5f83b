// The map of all experts, what they specialise in, and how routing moved.
const measures = [];
for (const { name, values } of labels) if (values.length > 1) measures.push({
  name, keys: values,
  says: `Colour: the ${name} that uses an expert most, against its use by all tokens. A pale tile serves all alike.`,
  colour: (layer, expert) => {
    const { value, relative } = favouriteOf(layer, expert, name);
    if (value < 0) return null;
    const strength = Math.round(100 * clamp(0.08 + 0.92 * Math.log2(relative) / 1.6, 0, 1));
    return `color-mix(in oklab, var(--d${value % 8}) ${strength}%, var(--even))`;
  },
  tell: (layer, expert) => {
    const { value, relative } = favouriteOf(layer, expert, name);
    return value < 0 ? "unused" : `${values[value]} uses it ${times(relative)} as much as all text`;
  },
});
const heatColour = (relative) => `var(--heat-${heatClass(relative)})`;
measures.push({
  name: "load", says: "Colour: an expert's share of its layer's work, against a fair share.",
  colour: (layer, expert) => heatColour(layers[layer].load[expert] * expertsOf(layer) / Math.max(1, sum(layers[layer].load))),
  tell: (layer, expert) => `${times(layers[layer].load[expert] * expertsOf(layer) / Math.max(1, sum(layers[layer].load)))} its fair share`,
});
measures.push({
  name: "weight", says: "Colour: the mean weight of an expert where it is chosen, against the layer's mean.",
  colour: (layer, expert) => layers[layer].weight[expert] === null ? null : heatColour(relativeWeight(layer, expert)),
  tell: (layer, expert) => layers[layer].weight[expert] === null ? "unused" : `mean weight ${layers[layer].weight[expert].toFixed(3)}`,
});
if (report.against) measures.push({
  name: "moved", says: `Colour: an expert's load in ${report.against}, against the one here.`,
  colour: (layer, expert) => heatColour(loadAfter(layer, expert)),
  tell: (layer, expert) => `its share of the work changes by ${(100 * layers[layer].movement.load_change[expert]).toFixed(2)} points`,
});

function relativeWeight(layer, expert) {
  const used = layers[layer].weight.filter((weight) => weight !== null);
  return layers[layer].weight[expert] / (sum(used) / used.length || 1);
}
function loadAfter(layer, expert) {
  const before = layers[layer].load[expert] / Math.max(1, sum(layers[layer].load));
  return before > 0 ? (before + layers[layer].movement.load_change[expert]) / before : layers[layer].movement.load_change[expert] > 0 ? 4 : 1;
}

const map = { measure: 0, layer: 0, expert: 0, tiles: [] };

function drawMap() {
  const box = byId("map"), most = Math.max(...layers.map((layer) => layer.load.length));
  box.style.setProperty("--columns", most);
  box.classList.toggle("dense", most > 40);
  map.tiles = layers.map((_, layer) => Array.from({ length: expertsOf(layer) }, (_, expert) => {
    const tile = html("span", { class: "tile", "data-layer": layer, "data-expert": expert });
    tile.style.gridColumn = `${expert + 2}`;
    tile.style.gridRow = `${layer + 1}`;
    return tile;
  }));
  box.replaceChildren(...map.tiles.flatMap((row, layer) => {
    const name = html("span", { class: "row" }, `${layer}`);
    name.style.gridRow = `${layer + 1}`;
    return [name, ...row];
  }));
}

function colourMap() {
  const measure = measures[map.measure];
  byId("measure-says").textContent = measure.says;
  byId("map-keys").replaceChildren(...(measure.keys || []).map((name, index) => html("span", { style: domainTile(index) }, name)));
  byId("map-keys").hidden = !measure.keys;
  byId("map-legend").hidden = Boolean(measure.keys);
  map.tiles.forEach((row, layer) => row.forEach((tile, expert) => {
    const colour = measure.colour(layer, expert);
    tile.classList.toggle("unused", colour === null || layers[layer].load[expert] === 0);
    tile.style.background = colour ?? "";
  }));
  showMapPlace();
}

function showMapPlace() {
  const { layer, expert } = map;
  for (const tile of document.querySelectorAll("#map .here, #map .chosen")) tile.classList.remove("here", "chosen");
  map.tiles[layer][expert].classList.add("here");
  map.tiles[chosen.layer][chosen.expert].classList.add("chosen");
  const load = layers[layer].load[expert], favourites = layers[layer].typical[expert].slice(0, 3).map((token) => shown(token.text));
  byId("map-readout").replaceChildren(html("b", {}, `Layer ${layer}, expert ${expert}`),
    ` · ${load ? measures[map.measure].tell(layer, expert) : "never used"}${favourites.length ? ` · likes ${favourites.join("  ")}` : ""}`);
}

function setUpMap() {
  const box = byId("map");
  drawMap();
  choices(byId("measures"), measures.map((measure) => measure.name), (name) => `Colour by ${name}`, (index) => { map.measure = index; colourMap(); });
  const at = (event) => event.target.closest(".tile");
  box.addEventListener("pointerover", (event) => {
    const tile = at(event);
    if (tile) { map.layer = +tile.dataset.layer; map.expert = +tile.dataset.expert; showMapPlace(); }
  });
  box.addEventListener("click", (event) => { const tile = at(event); if (tile) choose(+tile.dataset.layer, +tile.dataset.expert); });
  arrows(box, (down, right) => {
    map.layer = clamp(map.layer + down, 0, layers.length - 1);
    map.expert = clamp(map.expert + right, 0, expertsOf(map.layer) - 1);
    showMapPlace();
  }, () => choose(map.layer, map.expert));
  chosen.listeners.push(() => { map.layer = chosen.layer; map.expert = chosen.expert; showMapPlace(); });
  colourMap();
}

function drawInformation(box, width, name) {
  const all = layers.map((layer) => layer.information[name]), height = 150, margins = { left: 34, right: 8, top: 10, bottom: 24 };
  const high = Math.max(...all.map((one) => Math.max(one.bits, one.chance_bits ?? 0)), 1e-3);
  const y = (bits) => margins.top + (1 - bits / high) * (height - margins.top - margins.bottom), bottom = height - margins.bottom;
  const step = (width - margins.left - margins.right) / all.length, bar = Math.min(26, step * 0.7);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const mark of ticks(0, high, 4)) picture.append(
    svg("line", { class: "grid", x1: margins.left, x2: width - margins.right, y1: y(mark), y2: y(mark) }),
    svg("text", { x: margins.left - 6, y: y(mark) + 4, "text-anchor": "end" }, `${+mark.toPrecision(3)}`));
  all.forEach((one, layer) => {
    const x = margins.left + (layer + 0.5) * step, chance = one.chance_bits ?? 0;
    const sure = one.p !== null && one.p <= 0.05;
    const group = svg("g", {}, svg("rect", { class: sure ? "bits" : "bits unsure", x: x - bar / 2, width: bar, y: y(one.bits), height: Math.max(0, bottom - y(one.bits)) }),
      svg("rect", { class: "chance", x: x - bar / 2, width: bar, y: y(Math.min(chance, one.bits)), height: Math.max(0, bottom - y(Math.min(chance, one.bits))) }));
    group.append(svg("title", {}, `Layer ${layer}: ${one.bits.toFixed(4)} bits`));
    picture.append(group);
    if (all.length <= 24 || layer % 4 === 0) picture.append(svg("text", { x, y: height - 8, "text-anchor": "middle" }, `${layer}`));
  });
  box.replaceChildren(picture);
}

function setUpInformation() {
  const asked = labels.filter(({ values }) => values.length > 1);
  byId("specialisation").hidden = asked.length === 0;
  for (const { name } of asked) {
    const all = layers.map((layer) => layer.information[name]), sure = all.filter((one) => one.p !== null && one.p <= 0.05).length;
    const plot = html("div", { class: "plot" });
    const verdict = all[0].chance_bits === null ? "Too little text for a baseline." : `Above chance in ${sure} of ${all.length} layers; baseline: ${all[0].unit}.`;
    byId("information").append(html("figure", { class: "chart" }, html("h3", {}, name), html("p", { class: "soft" }, verdict), plot));
    onWidth(plot, (width) => drawInformation(plot, width, name));
  }
  const cell = (value, digits) => html("td", {}, value === null ? "–" : value.toFixed(digits));
  const rows = layers.flatMap((layer, index) => asked.map(({ name }) => {
    const one = layer.information[name];
    return html("tr", {}, html("th", { scope: "row" }, `${index}`), html("td", {}, name), cell(one.bits, 4), cell(one.sample_bits, 4), cell(one.chance_bits, 4), cell(one.z, 1), cell(one.p, 2), cell(one.label_bits, 3));
  }));
  const head = ["layer", "label", "bits", "bits of the sample", "by chance", "z", "p", "most possible"];
  byId("information-table").append(html("table", {}, html("thead", {}, html("tr", {}, ...head.map((name) => html("th", { scope: "col" }, name)))), html("tbody", {}, ...rows)));
}

function setUpMoved() {
  if (!report.against) return;
  const head = ["layer", "tokens with another set", "another first expert", "experts kept", "load moved", ...report.sources];
  const rows = layers.map(({ movement }, index) => html("tr", {}, html("th", { scope: "row" }, `${index}`),
    ...[movement.changed, movement.first_changed, movement.kept, movement.load_shift, ...movement.changed_by_source].map((share) =>
      html("td", { class: "bar-cell", style: `--share: ${share}` }, percent(share)))));
  byId("moved-table").append(html("table", {}, html("thead", {}, html("tr", {}, ...head.map((name) => html("th", { scope: "col" }, name)))), html("tbody", {}, ...rows)));
  chosen.listeners.push(() => {
    const flow = layers[chosen.layer].movement.flow;
    byId("moved-flow").replaceChildren(flow.length ? `Most tokens changed in layer ${chosen.layer}: ` : `Nobody changed in layer ${chosen.layer}.`,
      ...flow.slice(0, 6).flatMap(([from, to, count]) => [expertButton(chosen.layer, from), " → ", expertButton(chosen.layer, to, `${count.toFixed(0)} tokens`), " "]));
  });
}

setUpMap();
setUpInformation();
setUpMoved();
