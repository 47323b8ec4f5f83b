// Three small multiples of loss over tokens, FLOPs and seconds; one picked step is shown in all of them.
const axes = {
  tokens: { name: "tokens", at: (run, place) => place.tokens, ticks, format: short, title: "tokens" },
  flops: { name: "flops", at: (run, place) => place.tokens * run.flops_per_token, ticks, format: short, title: "FLOPs" },
  seconds: { name: "seconds", at: (run, place) => place.seconds, ticks: secondTicks, format: duration, title: "wall clock" },
};
const margin = { top: 16, right: 58, bottom: 40, left: 38 }, chartHeight = 290;
const lossState = { lateOnly: false, step: null, charts: [] };
const places = (series) => series.step.map((step, index) => ({
  step, tokens: series.tokens[index], seconds: series.seconds[index], loss: series.loss[index],
}));
const runs = report.runs.map((run) => ({ ...run, train: places(run.train), eval: places(run.eval) }));
const evaluatedSteps = [...new Set(runs.flatMap((run) => run.eval.map((place) => place.step)))].sort((a, b) => a - b);
const lastStep = evaluatedSteps.at(-1);

function lossRange(fromStep) {
  const losses = runs.flatMap((run) => [...run.eval, ...run.train].filter((p) => p.step >= fromStep).map((p) => p.loss));
  if (!losses.length) losses.push(report.target);
  const low = Math.min(...losses), high = Math.max(...losses), pad = Math.max(0.02, (high - low) * 0.06);
  return [low - pad, high + pad];
}

function drawChart(axis, box, width) {
  const value = axis.at, fromStep = lossState.lateOnly ? lastStep / 2 : 0;
  const shown = runs.flatMap((run) => run.eval.filter((p) => p.step >= fromStep).map((p) => value(run, p)));
  const left = lossState.lateOnly ? Math.min(...shown) : 0, right = Math.max(...shown) || 1;
  // The first steps fall so steeply that they would flatten the rest: the frame opens where 6 % of the run are over.
  const [low, high] = lossRange(lossState.lateOnly ? fromStep : Math.min(lastStep * 0.06, evaluatedSteps[0]));
  const x = (v) => margin.left + (right > left ? (v - left) / (right - left) : 1) * (width - margin.left - margin.right);
  const y = (v) => margin.top + (high - v) / (high - low) * (chartHeight - margin.top - margin.bottom);
  const bottom = chartHeight - margin.bottom, clip = `clip-${axis.name}`;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${chartHeight}`, height: chartHeight, "aria-hidden": "true" });
  picture.append(svg("clipPath", { id: clip }, svg("rect", {
    x: margin.left - 5, y: margin.top - 6, width: width - margin.left - margin.right + 10, height: bottom - margin.top + 12 })));
  for (const mark of ticks(low, high, 6, 10, [1, 2, 2.5, 5, 10])) picture.append(
    svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(mark), y2: y(mark) }),
    svg("text", { x: margin.left - 7, y: y(mark) + 4, "text-anchor": "end" }, `${+mark.toFixed(4)}`));
  for (const mark of axis.ticks(left, right, Math.max(2, Math.floor(width / 90)))) picture.append(
    svg("line", { class: "base", x1: x(mark), x2: x(mark), y1: bottom, y2: bottom + 4 }),
    svg("text", { x: x(mark), y: bottom + 17, "text-anchor": "middle" }, axis.format(mark)));
  picture.append(
    svg("line", { class: "base", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }),
    svg("text", { x: (margin.left + width - margin.right) / 2, y: chartHeight - 5, "text-anchor": "middle" }, axis.title),
    svg("line", { class: "target", x1: margin.left, x2: width - margin.right, y1: y(report.target), y2: y(report.target) }));
  const curves = svg("g", { "clip-path": `url(#${clip})` });
  for (const kind of ["train", "eval"]) for (const run of [...runs].reverse())
    curves.append(...drawRun(run, kind, (p) => x(value(run, p)), (p) => y(p.loss)));
  picture.append(curves, ...drawCrossing(axis, x, y, bottom), ...drawNames(y, width - margin.right + 9));
  const overlay = svg("g");
  picture.append(overlay);
  box.replaceChildren(picture);
  return { overlay, x, y, bottom, value, invert: (px) => left + (px - margin.left) / (width - margin.left - margin.right) * (right - left) };
}

function drawRun(run, kind, x, y) {
  const points = run[kind];
  const path = points.map((p, index) => `${index ? "L" : "M"}${x(p).toFixed(1)} ${y(p).toFixed(1)}`).join("");
  const nodes = [svg("path", { class: `line ${kind} ${run.role}-ink`, d: path })];
  if (kind === "eval" && points.length <= 40) for (const p of points) nodes.push(run.role === "sparse"
    ? svg("circle", { class: "dot sparse-ink", cx: x(p), cy: y(p), r: 3 })
    : svg("rect", { class: "dot dense-ink", x: x(p) - 2.6, y: y(p) - 2.6, width: 5.2, height: 5.2 }));
  return nodes;
}

function drawCrossing(axis, x, y, bottom) {
  if (!report.crossing) return [];
  const px = x(axis.at(runs[0], report.crossing)), py = y(report.target), ratio = report.ratios[axis.name];
  if (px < margin.left) return [];
  const nodes = [
    svg("line", { class: "target", x1: px, x2: px, y1: py, y2: bottom }),
    svg("circle", { class: "crossing", cx: px, cy: py, r: 6.5 })];
  const nearEdge = px < margin.left + 60;
  if (ratio !== null) nodes.push(svg("text", { class: "crossing-label", x: px + (nearEdge ? 7 : -7), y: bottom - 8,
    "text-anchor": nearEdge ? "start" : "end" }, `${ratio.toFixed(2)} ×`));
  return nodes;
}

// Names stand in the right margin at the height where their curve ends; the dotted line leads to the dense one.
function drawNames(y, px) {
  const ends = runs.map((run) => ({ role: run.role, loss: run.eval.at(-1).loss, py: y(run.eval.at(-1).loss) }));
  const [upper, lower] = [...ends].sort((a, b) => a.py - b.py);
  const crowd = 32 - (lower.py - upper.py);
  if (crowd > 0) { upper.py -= crowd / 2; lower.py += crowd / 2; }
  return ends.flatMap(({ role, loss, py }) => [
    svg("text", { class: `name ${role}-ink`, x: px, y: py - 1 }, role),
    svg("text", { x: px, y: py + 12 }, loss.toFixed(3))]);
}

function pick(step) {
  lossState.step = step;
  const picked = runs.map((run) => ({ run, place: run.eval.find((place) => place.step === step) })).filter((p) => p.place);
  const says = picked.map(({ run, place }) => `${run.role} ${place.loss.toFixed(4)} after ${duration(place.seconds)}`);
  const text = `step ${step}, ${short(picked[0].place.tokens)} tokens: ${says.join("; ")}`;
  for (const { drawn, plot } of lossState.charts) {
    plot.setAttribute("aria-valuenow", evaluatedSteps.indexOf(step));
    plot.setAttribute("aria-valuetext", text);
    drawn.overlay.replaceChildren(...picked.flatMap(({ run, place }) => {
      const px = drawn.x(drawn.value(run, place)), py = drawn.y(place.loss);
      if (px < margin.left - 1) return [];
      // At the end of the run the line would only hide the ring of the crossing.
      return [...(step === lastStep ? [] : [svg("line", { class: "cursor", x1: px, x2: px, y1: margin.top, y2: drawn.bottom })]),
        svg("circle", { class: `picked ${run.role}-ink`, cx: px, cy: Math.max(py, margin.top - 6), r: 5.5 })];
    }));
  }
  const readout = document.getElementById("loss-readout");
  readout.replaceChildren(html("b", {}, `Step ${step.toLocaleString("en")}`), ` · ${short(picked[0].place.tokens)} tokens`);
  for (const { run, place } of picked) readout.append(" · ",
    html("b", { class: run.role[0] }, `${run.role} ${place.loss.toFixed(4)}`), ` after ${duration(place.seconds)}`);
  if (picked.length === 2) {
    const gain = picked[1].place.loss - picked[0].place.loss;
    readout.append(` · sparse ${Math.abs(gain).toFixed(4)} ${gain >= 0 ? "lower" : "higher"}`);
  }
}

function setUpChart(figure) {
  const axis = axes[figure.dataset.axis], plot = figure.querySelector(".plot"), chart = { plot, drawn: null };
  for (const [key, value] of Object.entries({ tabindex: 0, role: "slider", "aria-valuemin": 0,
    "aria-valuemax": evaluatedSteps.length - 1, "aria-label": `Validation loss against ${axis.title}; arrow keys move through the evaluations` }))
    plot.setAttribute(key, value);
  chart.redraw = onWidth(plot, (width) => {
    chart.drawn = drawChart(axis, plot, width);
    if (!lossState.charts.includes(chart)) lossState.charts.push(chart);
    pick(lossState.step ?? lastStep);
  });
  plot.addEventListener("pointermove", (event) => {
    const at = chart.drawn.invert(event.clientX - plot.getBoundingClientRect().left);
    let best = null, distance = Infinity;
    for (const run of runs) for (const place of run.eval) {
      const away = Math.abs(axis.at(run, place) - at);
      if (away < distance) [best, distance] = [place.step, away];
    }
    if (best !== lossState.step) pick(best);
  });
  plot.addEventListener("keydown", (event) => {
    const now = evaluatedSteps.indexOf(lossState.step), last = evaluatedSteps.length - 1;
    const next = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    pick(evaluatedSteps[Math.max(0, Math.min(last, next))]);
  });
}

for (const figure of document.querySelectorAll(".chart")) setUpChart(figure);
choices(document.getElementById("loss-view"), ["Whole run", "Second half"], (name) => name, (index) => {
  lossState.lateOnly = index === 1;
  for (const chart of lossState.charts) chart.redraw();
});
