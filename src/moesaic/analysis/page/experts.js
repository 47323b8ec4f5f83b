// The mosaic, the load map and the domain matrix.
const layerCount = Math.max(report.load ? report.load.layers.length : 0, report.domains ? report.domains.layers.length : 0);
const layerState = { layer: 0, redraw: [] };

function chooseLayer(layer) {
  layerState.layer = layer;
  for (const redraw of layerState.redraw) redraw();
}

const layerNames = Array.from({ length: layerCount }, (_, index) => `${index}`);
for (const box of document.querySelectorAll(".choices.layers")) {
  const show = choices(box, layerNames, (name) => `Layer ${name}`, chooseLayer);
  layerState.redraw.push(() => show(layerState.layer));
  box.prepend(html("span", { "aria-hidden": "true" }, "Layer"));
}

const domainColour = (index) => `--tile: var(--d${Math.min(index, 7)})`;
// The domain that uses an expert most, against its use by all text.
function favourite(layer, expert) {
  let best = { domain: -1, relative: 0 };
  layer.forEach((shares, domain) => { if ((shares[expert] ?? 0) > best.relative) best = { domain, relative: shares[expert] }; });
  return best;
}

function drawMosaic() {
  const { names, layers } = report.domains, figure = document.getElementById("mosaic");
  const experts = layers[0][0].length, picture = svg("svg", {
    viewBox: `0 0 ${experts * 10} ${layers.length * 10}`, role: "img",
    "aria-label": `Mosaic of ${layers.length} layers with ${experts} experts each, coloured by the domain that uses an expert most. The domain matrix below holds the numbers.` });
  layers.forEach((layer, row) => {
    for (let column = 0; column < experts; column += 1) {
      const { domain, relative } = favourite(layer, column);
      const strength = domain < 0 ? 0 : Math.round(100 * Math.min(1, 0.1 + 0.9 * Math.log2(relative) / 1.3));
      const tile = svg("rect", { x: column * 10 + 0.5, y: row * 10 + 0.5, width: 9, height: 9, rx: 1.2,
        style: `fill: color-mix(in oklab, var(--d${Math.max(0, Math.min(domain, 7))}) ${strength}%, var(--even))` });
      tile.append(svg("title", {}, domain < 0 ? `Layer ${row}, expert ${column}: unused`
        : `Layer ${row}, expert ${column}: ${names[domain]} uses it ${relative.toFixed(2)} × as much as all text`));
      picture.append(tile);
    }
  });
  figure.querySelector(".picture").append(picture);
  names.forEach((name, index) => figure.querySelector(".keys").append(html("span", { style: domainColour(index) }, name)));
  figure.hidden = false;
}

function drawMatrix() {
  const { names, layers } = report.domains, layer = layers[Math.min(layerState.layer, layers.length - 1)];
  let order = layer[0].map((_, expert) => expert);
  if (document.getElementById("grouped").checked) {
    const best = order.map((expert) => favourite(layer, expert));
    order = order.sort((a, b) => best[a].domain - best[b].domain || best[b].relative - best[a].relative);
  }
  const head = html("tr", {}, html("th", { scope: "col" }, "expert"), ...order.map((e) => html("th", { scope: "col" }, `${e}`)));
  const body = layer.map((shares, domain) => html("tr", {},
    html("th", { scope: "row" }, html("span", { class: "tile", style: domainColour(domain) }), names[domain]),
    ...order.map((expert) => {
      const relative = shares[expert];
      const says = relative === null ? "never used" : `${relative.toFixed(2)} ×`;
      return html("td", { class: relative === null ? "empty" : `heat-${heatClass(relative)}`, title: `${names[domain]}, expert ${expert}: ${says}` },
        html("span", {}, relative === null ? "–" : relative.toFixed(1)));
    })));
  document.getElementById("domain-matrix").replaceChildren(html("table", { class: order.length > 24 ? "matrix many" : "matrix" },
    html("thead", {}, head), html("tbody", {}, ...body)));
}

const loadState = { expert: 0, column: 0 };
const loadMargin = { top: 4, right: 14, bottom: 36, left: 34 };

function drawLoad(box, width) {
  const { steps, layers } = report.load, layer = layers[Math.min(layerState.layer, layers.length - 1)], experts = layer.length;
  const cell = { width: (width - loadMargin.left - loadMargin.right) / steps.length, height: Math.max(5, Math.min(20, 340 / experts)) };
  const height = loadMargin.top + loadMargin.bottom + cell.height * experts, bottom = height - loadMargin.bottom;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  // One path per colour: thousands of cells stay eleven nodes.
  const paths = Array.from({ length: heatClasses }, () => []);
  const gap = experts <= 32 ? 1 : 0;
  layer.forEach((shares, expert) => shares.forEach((relative, column) => {
    const x = loadMargin.left + column * cell.width, y = loadMargin.top + expert * cell.height;
    paths[heatClass(relative)].push(`M${x.toFixed(2)} ${y.toFixed(2)}h${(cell.width + 0.3).toFixed(2)}v${(cell.height - gap).toFixed(2)}h-${(cell.width + 0.3).toFixed(2)}z`);
  }));
  paths.forEach((path, index) => { if (path.length) picture.append(svg("path", { class: `heat heat-${index}`, d: path.join("") })); });
  for (const mark of ticks(0, experts - 1, Math.min(experts, Math.floor(bottom / 22))).filter(Number.isInteger)) picture.append(
    svg("text", { x: loadMargin.left - 6, y: loadMargin.top + (mark + 0.5) * cell.height + 4, "text-anchor": "end" }, `${mark}`));
  for (const mark of ticks(steps[0], steps.at(-1), Math.max(2, Math.floor(width / 110))).filter(Number.isInteger)) {
    const x = loadMargin.left + (steps.findIndex((step) => step >= mark) + 0.5) * cell.width;
    picture.append(svg("line", { class: "base", x1: x, x2: x, y1: bottom, y2: bottom + 4 }),
      svg("text", { x, y: bottom + 16, "text-anchor": "middle" }, short(mark)));
  }
  picture.append(svg("text", { x: loadMargin.left + (width - loadMargin.left) / 2, y: height - 4, "text-anchor": "middle" }, "step"));
  const frame = svg("rect", { class: "pick", width: Math.max(cell.width, 4), height: cell.height - gap });
  picture.append(frame);
  box.replaceChildren(picture);
  return (expert, column) => {
    frame.setAttribute("x", loadMargin.left + column * cell.width);
    frame.setAttribute("y", loadMargin.top + expert * cell.height);
    return { cell, experts, relative: layer[expert][column], step: steps[column] };
  };
}

function setUpLoad() {
  const box = document.getElementById("load-map"), readout = document.getElementById("load-readout"), columns = report.load.steps.length;
  for (const [key, value] of Object.entries({ tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-describedby": "load-readout",
    "aria-label": "Expert load over the run; arrow keys move between steps and experts" })) box.setAttribute(key, value);
  let mark = null;
  const show = () => {
    const experts = report.load.layers[Math.min(layerState.layer, report.load.layers.length - 1)].length;
    loadState.expert = Math.max(0, Math.min(experts - 1, loadState.expert));
    loadState.column = Math.max(0, Math.min(columns - 1, loadState.column));
    const { relative, step } = mark(loadState.expert, loadState.column);
    const says = relative > 0 ? `${(100 * relative / experts).toFixed(1)} % of the layer's assignments, ${relative.toFixed(2)} × its fair share` : "no assignment at all";
    readout.replaceChildren(html("b", {}, `Layer ${layerState.layer}, expert ${loadState.expert}, step ${step.toLocaleString("en")}`), ` · ${says}`);
  };
  loadState.column = columns - 1;
  layerState.redraw.push(onWidth(box, (width) => { mark = drawLoad(box, width); show(); }));
  box.addEventListener("pointermove", (event) => {
    const frame = box.getBoundingClientRect(), { cell } = mark(loadState.expert, loadState.column);
    loadState.expert = Math.floor((event.clientY - frame.top - loadMargin.top) / cell.height);
    loadState.column = Math.floor((event.clientX - frame.left - loadMargin.left) / cell.width);
    show();
  });
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    loadState.expert += move[0];
    loadState.column += move[1];
    show();
  });
}

if (report.load) setUpLoad();
if (report.domains) {
  drawMosaic();
  drawMatrix();
  layerState.redraw.push(drawMatrix);
  document.getElementById("grouped").addEventListener("change", drawMatrix);
}
