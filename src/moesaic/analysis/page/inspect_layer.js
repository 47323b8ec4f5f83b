// One layer: its numbers, who uses which expert, pairs of experts, the cache.
function drawLayerFacts() {
  const layer = layers[chosen.layer], rows = sum(layer.load);
  byId("layer-title").textContent = `Layer ${chosen.layer}`;
  const entries = [
    ["MaxVio", layer.max_vio.toFixed(2), "busiest expert above its fair share"],
    ["Evenness", percent(layer.load_entropy), "entropy of the load"],
    ["Experts per token", +layer.experts_per_token.toFixed(2)],
    ["Unused", `${layer.dead.length}`, `of ${layer.load.length}`],
    ["Nearly the same", `${layer.duplicates.length}`, "pairs"],
  ];
  if (layer.top_share !== null) entries.push(["Confidence", percent(layer.top_share), "of a token's weight on its first expert"]);
  if (layer.margin !== null) entries.push(["Margin", layer.margin.toFixed(2), "last chosen logit above the best refused"]);
  const half = layer.hits[Math.floor(layer.load.length / 2)];
  entries.push(["Cache of half", percent(half / Math.max(1, rows), 0), "of the experts that tokens ask for"]);
  facts(byId("layer-facts"), entries);
}

function drawLabelMatrix() {
  const { name, values } = labels.find((label) => label.name === chosen.label), use = relativeUse(chosen.layer, name);
  let order = layers[chosen.layer].load.map((_, expert) => expert);
  if (byId("sorted").checked) {
    const best = order.map((expert) => favouriteOf(chosen.layer, expert, name));
    order = order.sort((a, b) => best[a].value - best[b].value || best[b].relative - best[a].relative);
  }
  const head = html("tr", {}, html("th", { scope: "col" }, "expert"), ...order.map((expert) => {
    const button = html("button", { type: "button", "aria-label": `Choose expert ${expert}` }, `${expert}`);
    button.addEventListener("click", () => choose(chosen.layer, expert));
    return html("th", { scope: "col", class: expert === chosen.expert ? "chosen" : "" }, button);
  }));
  const body = use.map((row, value) => row.some((one) => one > 0) && html("tr", {},
    html("th", { scope: "row" }, html("span", { class: "tile", style: domainTile(value) }), values[value]),
    ...order.map((expert) => {
      const relative = row[expert], says = relative === null ? "never used" : times(relative);
      return html("td", { class: `${relative === null ? "empty" : `heat-${heatClass(relative)}`}${expert === chosen.expert ? " chosen" : ""}`, title: `${values[value]}, expert ${expert}: ${says}` },
        html("span", {}, relative === null ? "–" : relative.toFixed(1)));
    }))).filter(Boolean);
  byId("label-matrix").replaceChildren(html("table", { class: order.length > 24 ? "matrix many" : "matrix" }, html("thead", {}, head), html("tbody", {}, ...body)));
}

function drawOverlap() {
  const names = report.sources, { overlap } = layers[chosen.layer];
  byId("overlap-box").hidden = names.length < 2;
  byId("overlap").replaceChildren(html("table", {},
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "domain"), ...names.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...overlap.map((row, index) => html("tr", {}, html("th", { scope: "row" }, names[index]), ...row.map((share) => html("td", {}, percent(share, 0))))))));
}

const pairKinds = [
  { key: "lift", name: "together", says: "Tokens that both compute, against chance. Bright: they share tokens; dark blue: they avoid each other.", tell: (value) => value === null ? "one is unused" : `together ${times(2 ** (4 * value))} as often as by chance`, heat: (value) => 2 ** (4 * value), diagonal: false },
  { key: "onward", name: "onward", says: "Rows: this layer; columns: the next. Tokens that go from one to the other, against chance.", tell: (value) => value === null ? "one is unused" : `${times(2 ** (4 * value))} as often as by chance`, heat: (value) => 2 ** (4 * value), diagonal: true },
  { key: "output_similarity", name: "outputs", says: "Cosine of what both make of the same tokens.", tell: (value) => `cosine ${(value ?? 0).toFixed(2)}`, heat: (value) => 4 ** value, diagonal: false },
  { key: "weight_similarity", name: "weights", says: "Cosine of their weights as they are stored. Near zero is usual, also for experts that compute much the same.", tell: (value) => `cosine ${(value ?? 0).toFixed(2)}`, heat: (value) => 4 ** value, diagonal: false },
].filter(({ key }) => layers.some((layer) => layer[key]));
const pairs = { kind: 0, row: 0, column: 0 };

function heatColours() {
  const style = getComputedStyle(document.body);
  return Array.from({ length: heatClasses }, (_, index) => {
    const probe = html("span", { style: `color: var(--heat-${index})` });
    document.body.append(probe);
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color || style.color;
  });
}

function drawPairs(box, width) {
  const kind = pairKinds[pairs.kind], cells = cellsOf(chosen.layer, kind.key), rows = expertsOf(chosen.layer);
  byId("pair-says").textContent = cells ? kind.says : `${kind.name}: not there for this layer.`;
  if (!cells) { box.replaceChildren(); byId("pair-readout").textContent = "\u00a0"; return; }
  const columns = cells.length / rows, size = Math.max(2, Math.min(26, Math.floor(Math.min(width, 420) / columns)));
  const scale = window.devicePixelRatio || 1, canvas = html("canvas", { width: columns * size * scale, height: rows * size * scale });
  canvas.style.width = `${columns * size}px`;
  const brush = canvas.getContext("2d"), colours = heatColours(), gap = size > 5 ? 1 : 0;
  brush.scale(scale, scale);
  for (let row = 0; row < rows; row += 1) for (let column = 0; column < columns; column += 1) {
    const value = cellValue(cells[row * columns + column]);
    if (value === null || (!kind.diagonal && row === column)) continue;
    brush.fillStyle = colours[heatClass(kind.heat(value))];
    brush.fillRect(column * size, row * size, size - gap, size - gap);
  }
  brush.strokeStyle = getComputedStyle(document.body).color;
  brush.lineWidth = 1.5;
  brush.strokeRect(0.75, chosen.expert * size - 0.25, columns * size - 1.5, size + 0.5);
  const mark = html("span", { class: "mark" });
  const frame = html("div", { class: "frame" }, canvas, mark);
  box.replaceChildren(frame);
  const show = () => {
    pairs.row = clamp(pairs.row, 0, rows - 1);
    pairs.column = clamp(pairs.column, 0, columns - 1);
    Object.assign(mark.style, { left: `${pairs.column * size}px`, top: `${pairs.row * size}px`, width: `${size}px`, height: `${size}px` });
    const same = !kind.diagonal && pairs.row === pairs.column;
    byId("pair-readout").replaceChildren(html("b", {}, `Experts ${pairs.row} and ${kind.key === "onward" ? `${chosen.layer + 1}.` : ""}${pairs.column}`),
      ` · ${same ? "the same" : kind.tell(cellValue(cells[pairs.row * columns + pairs.column]))}`);
  };
  canvas.addEventListener("pointermove", (event) => {
    const area = canvas.getBoundingClientRect();
    pairs.row = Math.floor((event.clientY - area.top) / size);
    pairs.column = Math.floor((event.clientX - area.left) / size);
    show();
  });
  canvas.addEventListener("click", () => choose(chosen.layer, pairs.row));
  pairs.show = show;
  show();
}

const cacheState = { size: 0, show: null };
function drawCache(box, width) {
  const layer = layers[chosen.layer], experts = layer.load.length, rows = Math.max(1, sum(layer.load)), height = 250;
  const area = { left: 40, right: 12, top: 10, bottom: 36 };
  const x = (size) => area.left + size / experts * (width - area.left - area.right), y = (share) => area.top + (1 - share) * (height - area.top - area.bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const mark of [0, 0.25, 0.5, 0.75, 1]) picture.append(svg("line", { class: "grid", x1: area.left, x2: width - area.right, y1: y(mark), y2: y(mark) }),
    svg("text", { x: area.left - 6, y: y(mark) + 4, "text-anchor": "end" }, `${100 * mark} %`));
  for (const mark of ticks(0, experts, 6).filter(Number.isInteger)) picture.append(svg("text", { x: x(mark), y: height - 18, "text-anchor": "middle" }, `${mark}`));
  picture.append(svg("text", { x: area.left + (width - area.left) / 2, y: height - 2, "text-anchor": "middle" }, "experts in the cache"));
  // Without memory a cache of the n busiest experts is right as often as these are chosen.
  const busiest = [...layer.load].sort((a, b) => b - a);
  let total = 0;
  const chance = [0, ...busiest.map((load) => (total += load) / rows)];
  const path = (values) => values.map((share, size) => `${size ? "L" : "M"}${x(size).toFixed(1)} ${y(share).toFixed(1)}`).join("");
  picture.append(svg("path", { class: "line dotted", d: path(chance) }), svg("path", { class: "line sparse-ink", d: path(layer.hits.map((hits) => hits / rows)) }));
  const dot = svg("circle", { class: "picked sparse-ink", r: 5 });
  picture.append(dot);
  box.replaceChildren(picture);
  cacheState.show = () => {
    cacheState.size = clamp(cacheState.size, 0, experts);
    const share = layer.hits[cacheState.size] / rows;
    dot.setAttribute("cx", x(cacheState.size));
    dot.setAttribute("cy", y(share));
    byId("cache-readout").replaceChildren(html("b", {}, `${cacheState.size} of ${experts} experts`), ` · hits ${percent(share)}; the busiest ones alone, ${percent(chance[cacheState.size])}`);
  };
  picture.addEventListener("pointermove", (event) => {
    const frame = picture.getBoundingClientRect();
    cacheState.size = Math.round((event.clientX - frame.left - area.left) / (width - area.left - area.right) * experts);
    cacheState.show();
  });
  cacheState.show();
}

function setUpLayer() {
  const known = labels.filter(({ values }) => values.length > 1);
  if (known.length) chosen.label = known[0].name;
  choices(byId("label-choice"), known.map(({ name }) => name), (name) => `Rows by ${name}`, (index) => { chosen.label = known[index].name; drawLabelMatrix(); });
  byId("sorted").addEventListener("change", drawLabelMatrix);
  choices(byId("pair-choice"), pairKinds.map(({ name }) => name), (name) => `Pairs: ${name}`, (index) => { pairs.kind = index; redrawPairs(); });
  const pairBox = byId("pairs"), redrawPairs = onWidth(pairBox, (width) => drawPairs(pairBox, width));
  arrows(pairBox, (down, right) => { pairs.row += down; pairs.column += right; pairs.show?.(); }, () => choose(chosen.layer, pairs.row));
  const cacheBox = byId("cache");
  cacheState.size = Math.floor(expertsOf(0) / 2);
  const redrawCache = onWidth(cacheBox, (width) => drawCache(cacheBox, width));
  arrows(cacheBox, (down, right) => { cacheState.size += right || -down; cacheState.show(); }, () => {});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawPairs);
  chosen.listeners.push(() => { drawLayerFacts(); drawLabelMatrix(); drawOverlap(); pairs.row = chosen.expert; pairs.column = layers[chosen.layer].partners[chosen.expert]?.[0]?.[0] ?? 0; redrawPairs(); redrawCache(); });
}
setUpLayer();
