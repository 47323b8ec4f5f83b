// One expert: what it likes, whom it serves, its company. And the search that finds it.
function bars(name, values, use) {
  const known = values.map((value, index) => [value, use[index]]).filter(([, relative]) => relative !== null && relative !== undefined);
  const box = html("div", { class: "bars" }, html("h4", {}, name));
  for (const [value, relative] of known) {
    const index = values.indexOf(value), length = clamp(relative / 4, 0, 1);
    box.append(html("div", { class: "bar-row" }, html("span", {}, value), html("i", { style: `--length: ${length}; ${domainTile(index)}` }), html("b", {}, times(relative))));
  }
  return box;
}

function marked(context) {
  const [before, token, after] = context.text;
  const quote = html("p", { class: "context", dir: "auto" }, before.replace(/\r?\n/g, "↵"), html("mark", { style: `--hue: ${hueOf(chosen.expert)}` }, shown(token)), after.replace(/\r?\n/g, "↵"));
  quote.prepend(html("small", {}, report.sources[context.source] ?? ""));
  return quote;
}

function companyRow(name, found) {
  return found.length ? [html("dt", {}, name), html("dd", {}, ...found.flatMap((button) => [button, " "]))] : [];
}

function alike(layer, expert, key) {
  const cells = cellsOf(layer, key), experts = expertsOf(layer);
  if (!cells) return [];
  return Array.from({ length: experts }, (_, other) => [other, cellValue(cells[expert * experts + other]) ?? 0]).filter(([other]) => other !== expert)
    .sort((a, b) => b[1] - a[1]).slice(0, 4).map(([other, cosine]) => expertButton(layer, other, cosine.toFixed(2)));
}

function drawExpert() {
  const { layer: index, expert } = chosen, layer = layers[index], load = layer.load[expert], rows = Math.max(1, sum(layer.load));
  byId("expert-title").textContent = `Expert ${index}.${expert}`;
  const entries = [["Share of the layer's work", percent(load / rows, 2), `${times(load * layer.load.length / rows)} its fair share`], ["Rows", load.toLocaleString("en")]];
  entries.push(["Mean weight", layer.weight[expert] === null ? "–" : layer.weight[expert].toFixed(3)]);
  const twins = layer.duplicates.filter(({ experts }) => experts.includes(expert));
  if (load === 0) entries.push(["Never used", "no token of this text"]);
  if (twins.length) entries.push(["Nearly the same as", twins.map(({ experts }) => experts.find((one) => one !== expert)).join(", ")]);
  if (layer.movement) entries.push(["Its share moved by", `${(100 * layer.movement.load_change[expert]).toFixed(2)} points`]);
  facts(byId("expert-facts"), entries);
  const tokens = layer.typical[expert], most = Math.max(1, ...tokens.map((token) => token.count));
  byId("favourites").replaceChildren(...(tokens.length ? tokens.map((token) => {
    const chip = html("span", { class: "chip", style: `--size: ${(0.85 + 0.75 * Math.sqrt(token.count / most)).toFixed(2)}rem; --hue: ${hueOf(expert)}`, title: `${token.count} times` }, shown(token.text));
    chip.append(html("small", {}, times(token.lift)));
    return chip;
  }) : [html("p", { class: "soft" }, "None: no token goes here more often than to others.")]));
  byId("serves").replaceChildren(...labels.filter(({ values }) => values.length > 1)
    .map(({ name, values }) => bars(name, values, relativeUse(index, name).map((row, value) => sum(layer.counts[name][value]) ? row[expert] : null))));
  byId("contexts").replaceChildren(...(layer.contexts[expert].length ? layer.contexts[expert].map(marked) : [html("p", { class: "soft" }, "Nowhere.")]));
  const company = byId("company");
  company.replaceChildren(
    ...companyRow("Shares tokens with", (layer.partners[expert] ?? []).map(([other, lift]) => expertButton(index, other, times(lift)))),
    ...companyRow("Hands on to", (layer.onward_partners?.[expert] ?? []).map(([other, lift]) => expertButton(index + 1, other, times(lift)))),
    ...companyRow("Computes much like", alike(index, expert, "output_similarity")),
    ...companyRow("Has weights like", alike(index, expert, "weight_similarity")));
  if (!company.children.length) company.append(html("dt", {}, "None"), html("dd", {}, "It is chosen independently of the others."));
}

// Whom the shown texts send a token to, most often first.
function inText(wanted) {
  const counts = new Map();
  for (const { tokens, experts } of report.texts) tokens.forEach((text, token) => {
    if (text.trim().toLowerCase() !== wanted) return;
    layers.forEach((_, layer) => {
      const expert = experts[layer][token][0], key = `${layer}.${expert}`;
      if (expert >= 0) counts.set(key, (counts.get(key) ?? 0) + 1);
    });
  });
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([key, count]) => {
    const [layer, expert] = key.split(".");
    return expertButton(+layer, +expert, `${count} in the text`);
  });
}

// "2.17" is an expert; everything else is looked for in favourite tokens.
function find(text) {
  const place = /^\s*(\d+)\s*[.:/ ]\s*(\d+)\s*$/.exec(text);
  if (place) return +place[1] < layers.length && +place[2] < expertsOf(+place[1]) ? [expertButton(+place[1], +place[2])] : [];
  const wanted = text.trim().toLowerCase(), hits = [];
  layers.forEach((layer, index) => layer.typical.forEach((tokens, expert) => {
    for (const token of tokens) {
      const plain = token.text.trim().toLowerCase();
      if (plain === wanted || (wanted.length > 1 && plain.startsWith(wanted))) {
        hits.push({ index, expert, token, exact: plain === wanted });
        break;
      }
    }
  }));
  if (!hits.length) return inText(wanted);
  hits.sort((a, b) => b.exact - a.exact || b.token.count * Math.log(b.token.lift) - a.token.count * Math.log(a.token.lift));
  return hits.slice(0, 10).map(({ index, expert, token }) => expertButton(index, expert, `${shown(token.text)} ${times(token.lift)}`));
}

function setUpSearch() {
  const box = byId("search"), found = byId("found");
  box.addEventListener("input", () => {
    const text = box.value;
    const buttons = text.trim() ? find(text) : [];
    found.replaceChildren(...(text.trim() && !buttons.length ? ["Nobody's favourite, and not in the text below."] : buttons));
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") found.querySelector("button")?.click();
    if (event.key === "Escape") { box.value = ""; found.replaceChildren(); }
  });
}

function setUpExpert() {
  const step = (by) => {
    const expert = chosen.expert + by;
    if (expert < 0 && chosen.layer > 0) choose(chosen.layer - 1, Infinity);
    else if (expert >= expertsOf(chosen.layer) && chosen.layer + 1 < layers.length) choose(chosen.layer + 1, 0);
    else choose(chosen.layer, expert);
  };
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  chosen.listeners.push(drawExpert);
}
setUpExpert();
setUpSearch();
