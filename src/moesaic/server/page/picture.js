// What the engine does, as figures and pictures: everything that /live tells.
import { fit, resolved } from "/page/colour.js";

const get = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 0)} s`;
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)} %`;

export function bytes(value) {
  for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]])
    if (value >= 1024 ** power) return `${(value / 1024 ** power).toPrecision(3)} ${unit}`;
  return `${value} B`;
}

// Half a minute of looks; those in which the engine did something are the last seconds.
const looks = 60, recentLooks = 6;
const units = { hits: number, misses: number, bytes_read: bytes, stall_seconds: seconds };

export class Picture {
  constructor() {
    this.rates = new Array(looks).fill(0);
    this.rate = 0;
    this.recent = [];
    this.total = [];
    setInterval(() => this.tick(), 500);
    document.addEventListener("theme", () => this.drawRates());
    new ResizeObserver(() => this.drawRates()).observe(get("sparkline").parentElement);
  }

  take(event) {
    this.rate = event.tokens_per_second;
    get("rate").textContent = number(this.rate);
    get("prompt-rate").textContent = number(event.prompt_tokens_per_second);
    get("running").textContent = number(event.running);
    get("waiting").textContent = number(event.waiting);
    get("kv").textContent = event.kv_blocks ? percent(event.kv_blocks_used / event.kv_blocks) : "–";
    get("kv").title = `${event.kv_blocks_used} of ${event.kv_blocks} blocks`;
    this.total = event.expert_load_total;
    if (event.recent.tokens > 0) this.recent = [...this.recent, event.recent].slice(-recentLooks);
    this.showCache(event);
  }

  // Each layer's shares in the period; over the last seconds each look counts by its tokens.
  shares(period) {
    if (period === "total" || !this.recent.length) return period === "total" ? this.total : [];
    const tokens = this.recent.reduce((sum, look) => sum + look.tokens, 0);
    return this.total.map((layer, index) => layer.map((_, expert) =>
      this.recent.reduce((sum, look) => sum + look.tokens * (look.expert_load[index]?.[expert] ?? 0), 0) / tokens));
  }

  showCache(event) {
    if (!event.hits && !event.misses) return;
    get("cache").hidden = false;
    for (const [name, write] of Object.entries(units)) {
      get(name).textContent = write(event[name]);
      get(`${name}-recent`).textContent = write(this.recent.reduce((sum, look) => sum + look[name], 0));
    }
    const rate = event.hits / (event.hits + event.misses);
    get("hit-rate").textContent = percent(rate);
    get("hit-bar").firstElementChild.style.width = `${100 * rate}%`;
    get("hit-bar").setAttribute("aria-label", `${percent(rate)} of the experts were in memory`);
  }

  idle() {
    this.rate = 0;
    get("rate").textContent = get("prompt-rate").textContent = "0";
    get("running").textContent = get("waiting").textContent = "–";
  }

  tick() {
    this.rates.push(this.rate);
    this.rates.shift();
    if (!document.hidden) this.drawRates();
  }

  drawRates() {
    const canvas = get("sparkline"), width = Math.floor(canvas.parentElement.clientWidth * 0.56), height = 44;
    if (width < 20) return;
    const context = fit(canvas, width, height), top = Math.max(1, ...this.rates) * 1.1, accent = resolved("--accent");
    const x = (index) => index / (looks - 1) * width, y = (rate) => height - 1.5 - rate / top * (height - 4);
    context.beginPath();
    this.rates.forEach((rate, index) => context.lineTo(x(index), y(rate)));
    context.strokeStyle = context.fillStyle = accent;
    context.lineWidth = 1.8;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(0, height);
    context.globalAlpha = 0.12;
    context.fill();
    canvas.setAttribute("aria-label", `Tokens per second in the last half minute, at most ${number(Math.max(...this.rates))}`);
  }
}
