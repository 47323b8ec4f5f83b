// The map of layers and experts, and the bars of one layer, both on a canvas.
import { topExpert } from "/page/answer.js";
import { fit, html, isDark, onWidth, resolved, solid } from "/page/colour.js";

const left = 26, top = 3, smallest = 3, most = 24, tall = 300, flashTime = 350;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class HeatMap {
  // `onCell` gets the cell {layer, expert} that is pointed at, or null; `onLayer` a layer that is chosen.
  constructor(box, bars, { onCell, onLayer }) {
    Object.assign(this, { box, bars, onCell, onLayer });
    this.ground = html("canvas", { "aria-hidden": "true" });
    this.overlay = html("canvas", { "aria-hidden": "true", class: "overlay" });
    box.append(this.ground, this.overlay);
    Object.assign(this, { shares: [], layers: 0, experts: 0, perToken: 1, layer: 0, cell: null, token: null, width: 0 });
    this.flashes = new Map();
    onWidth(box, (width) => {
      this.width = width;
      this.draw();
      this.reveal(this.layer);
    });
    document.addEventListener("theme", () => this.draw());
    box.addEventListener("pointermove", (event) => this.point(this.at(event)));
    box.addEventListener("pointerleave", () => { if (document.activeElement !== box) this.point(null); });
    box.addEventListener("blur", () => this.point(null));
    box.addEventListener("click", (event) => {
      const cell = this.at(event);
      if (cell) this.onLayer(cell.layer);
      this.point(cell);
    });
    box.addEventListener("keydown", (event) => this.walk(event));
  }

  shape(layers, experts, perToken) {
    Object.assign(this, { layers, experts, perToken: Math.max(1, perToken) });
    this.shares = Array.from({ length: layers }, () => new Array(experts).fill(0));
    this.draw();
  }

  show(shares) {
    this.shares = shares;
    this.draw();
  }

  choose(layer) {
    this.layer = layer;
    this.draw();
    this.reveal(layer);
  }

  // The map of a deep model is higher than its frame.
  reveal(layer) {
    if (!this.grid) return;
    const frame = this.box.parentElement, y = top + layer * this.grid.pitch;
    if (y < frame.scrollTop || y + this.grid.pitch > frame.scrollTop + frame.clientHeight) frame.scrollTop = y - frame.clientHeight / 2;
  }

  // The share at which a cell has its full colour, in multiples of the fair one: an expert that takes part in every
  // token has experts / perToken of them.
  get full() { return Math.min(4, Math.max(1.5, this.experts / this.perToken)); }
  relative(layer, expert) { return (this.shares[layer]?.[expert] ?? 0) * this.experts; }

  // A layer of more experts than fit takes several lines.
  measure() {
    const room = this.width - left, lines = Math.max(1, Math.ceil(this.experts * smallest / room));
    const columns = Math.ceil(this.experts / lines), wide = room / columns, gap = lines > 1 ? 3 : 0;
    const high = Math.max(smallest, Math.min(most, wide * 2, (tall - this.layers * gap) / (this.layers * lines)));
    const pitch = high * lines + gap;
    return { lines, columns, wide, high, pitch, gap, height: 2 * top + this.layers * pitch, grout: wide > 5 ? 1 : 0, groutDown: high > 5 ? 1 : 0 };
  }

  place(layer, expert) {
    const { columns, wide, high, pitch } = this.grid;
    return [left + expert % columns * wide, top + layer * pitch + Math.floor(expert / columns) * high];
  }

  at(event) {
    if (!this.grid) return null;
    const frame = this.box.getBoundingClientRect(), { columns, wide, high, pitch, lines } = this.grid;
    const x = event.clientX - frame.left - left, y = event.clientY - frame.top - top;
    const layer = Math.floor(y / pitch), column = Math.floor(x / wide);
    const line = Math.min(lines - 1, Math.floor((y - layer * pitch) / high)), expert = line * columns + column;
    return layer >= 0 && layer < this.layers && column >= 0 && column < columns && expert < this.experts ? { layer, expert } : null;
  }

  fill(context, layer, expert, colour, strength) {
    const [x, y] = this.place(layer, expert), { wide, high, grout, groutDown } = this.grid;
    context.globalAlpha = strength;
    context.fillStyle = colour;
    context.fillRect(x, y, wide - grout, high - groutDown);
  }

  draw() {
    if (!this.width || !this.layers) return;
    this.grid = this.measure();
    const { pitch, gap, height } = this.grid, context = fit(this.ground, this.width, height);
    this.colours = { even: resolved("--even"), accent: resolved("--accent"), soft: resolved("--soft"), ink: resolved("--ink"), card: resolved("--card") };
    this.box.style.height = `${height}px`;
    for (let layer = 0; layer < this.layers; layer += 1) for (let expert = 0; expert < this.experts; expert += 1) {
      this.fill(context, layer, expert, this.colours.even, 1);
      this.fill(context, layer, expert, this.colours.accent, Math.min(1, this.relative(layer, expert) / this.full) ** 0.6);
    }
    context.globalAlpha = 1;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(14 / pitch);
    for (let layer = 0; layer < this.layers; layer += 1) if (layer === this.layer || (layer % every === 0 && Math.abs(layer - this.layer) >= every)) {
      context.fillStyle = layer === this.layer ? this.colours.ink : this.colours.soft;
      context.font = `${layer === this.layer ? "700 " : ""}11px system-ui, sans-serif`;
      context.fillText(`${layer}`, left - 8, top + layer * pitch + (pitch - gap) / 2 + 0.5);
    }
    this.drawBars();
    this.drawOverlay();
  }

  drawBars() {
    const shares = this.shares[this.layer] ?? [], high = 64, foot = 6, wide = (this.width - left) / this.experts, dark = isDark();
    const context = fit(this.bars, this.width, high), highest = Math.max(2 / this.experts, ...shares), gap = wide > 5 ? 1 : 0;
    for (let expert = 0; expert < this.experts; expert += 1) {
      const height = (shares[expert] ?? 0) / highest * (high - foot);
      context.fillStyle = solid(expert, dark);
      context.fillRect(left + expert * wide, high - 4, wide - gap, 4);
      context.fillRect(left + expert * wide, high - foot - height, wide - gap, height);
    }
    context.strokeStyle = this.colours.soft;
    context.setLineDash([2, 3]);
    const fair = Math.round(high - foot - (high - foot) / this.experts / highest) + 0.5;
    context.beginPath();
    context.moveTo(left, fair);
    context.lineTo(this.width, fair);
    context.stroke();
    context.fillStyle = this.colours.soft;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText("fair", left - 3, fair + 4);
  }

  // The leading experts of a token that was just written light up for a moment.
  flash(token) {
    if (still.matches || !this.grid) return;
    const until = performance.now() + flashTime;
    token.experts.forEach((_, layer) => {
      const expert = topExpert(token, layer);
      if (expert !== undefined) this.flashes.set(layer * this.experts + expert, until);
    });
    this.animation ??= requestAnimationFrame(() => this.fade());
  }

  fade() {
    const now = performance.now();
    for (const [cell, until] of this.flashes) if (until <= now) this.flashes.delete(cell);
    this.drawOverlay(now);
    this.animation = this.flashes.size ? requestAnimationFrame(() => this.fade()) : undefined;
  }

  // Outlines the experts of a token; null takes them away.
  outline(token) {
    this.token = token;
    this.drawOverlay();
  }

  drawOverlay(now = performance.now()) {
    if (!this.grid) return;
    const { wide, high, height, grout, groutDown } = this.grid, context = fit(this.overlay, this.width, height), dark = isDark();
    if (this.token?.experts.length) {
      context.globalAlpha = 0.8;
      context.fillStyle = this.colours.card;
      context.fillRect(left, 0, this.width - left, height);
      this.token.experts.forEach((experts, layer) => experts.forEach((expert) => this.fill(context, layer, expert, solid(expert, dark), 1)));
    } else for (const [cell, until] of this.flashes)
      this.fill(context, Math.floor(cell / this.experts), cell % this.experts, solid(cell % this.experts, dark), Math.max(0, (until - now) / flashTime));
    if (!this.cell) return;
    const [x, y] = this.place(this.cell.layer, this.cell.expert);
    context.globalAlpha = 1;
    context.strokeStyle = this.colours.ink;
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, wide - grout + 2, high - groutDown + 2);
  }

  point(cell) {
    if (cell?.layer === this.cell?.layer && cell?.expert === this.cell?.expert) return;
    this.cell = cell;
    this.drawOverlay();
    this.onCell(cell);
  }

  walk(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const at = this.cell ?? { layer: this.layer, expert: -1 };
    if (event.key === "Enter" && this.cell) this.onLayer(this.cell.layer);
    if (!(event.key in moves) || !this.grid) return;
    event.preventDefault();
    const [down, right] = moves[event.key], within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.point({ layer: within(at.layer + down, this.layers), expert: within(at.expert + right, this.experts) });
    this.reveal(this.cell.layer);
  }
}
