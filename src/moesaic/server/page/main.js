// The page: puts the chat, the picture and the server together.
import { ask, events, setKey } from "/page/api.js";
import { colourBy, mark } from "/page/answer.js";
import { hideCard } from "/page/card.js";
import { Chat } from "/page/chat.js";
import { html, paint } from "/page/colour.js";
import { HeatMap } from "/page/heatmap.js";
import { Picture } from "/page/picture.js";

const get = (id) => document.getElementById(id);
const prompt = get("prompt"), slider = get("layer"), link = get("link");

const picture = new Picture();
const heat = new HeatMap(get("map"), get("bars"), { onCell: (cell) => { mark(cell); tell(); }, onLayer: chooseLayer });
const chat = new Chat({ onToken: (token) => heat.flash(token), onPoint: (token) => heat.outline(token), onLocked: askForKey });

function chooseLayer(layer) {
  slider.value = `${layer}`;
  slider.setAttribute("aria-valuetext", `Layer ${layer}`);
  get("layer-name").textContent = `${layer}`;
  heat.choose(layer);
  colourBy(layer);
}

const period = () => document.querySelector("input[name=period]:checked").value;

// What the map says about the cell that is pointed at, or about the busiest one.
function tell() {
  let { layer, expert } = heat.cell ?? { layer: 0, expert: 0 };
  if (!heat.cell) heat.shares.forEach((shares, index) => shares.forEach((share, other) => {
    if (share > (heat.shares[layer]?.[expert] ?? 0)) [layer, expert] = [index, other];
  }));
  const share = heat.shares[layer]?.[expert] ?? 0;
  const says = share ? `${(100 * share).toFixed(1)} % of the layer's work, ${heat.relative(layer, expert).toFixed(1)} × its fair share` : "no work";
  const name = `layer ${layer}, expert ${expert}`;
  if (heat.cell) get("readout").textContent = `L${name.slice(1)}: ${says}`;
  else get("readout").textContent = share ? `Busiest: ${name}, ${says}` : period() === "total" ? "No work yet." : "No work in the last seconds.";
}

function showLoad() {
  const shares = picture.shares(period());
  if (shares.length) heat.show(shares);
  else heat.shape(heat.layers, heat.experts, heat.perToken);
  tell();
}

function showModel(model) {
  const { layers_of_experts: layers, num_experts: experts, experts_per_token: perToken, has_chat_template: chats } = model.moesaic;
  chat.model = model;
  get("model").textContent = model.id.split(/[\\/]/).filter(Boolean).pop() ?? model.id;
  get("model").title = model.id;
  document.title = `${get("model").textContent} · moesaic`;
  const sparse = layers > 0 && experts > 0;
  get("load").hidden = !sparse;
  const facts = sparse ? `${layers} layer${layers === 1 ? "" : "s"} of ${experts} experts, ${perToken} for each token. Every word of the answer takes the colour of the expert that had most say in it.`
    : "This model is dense: it has no experts to watch.";
  const how = chats ? "" : " It has no chat template, so it goes on with the text that you begin.";
  if (get("facts")) get("facts").textContent = facts + how;
  get("system-field").hidden = !chats;
  get("prompt-label").textContent = chats ? "Message" : "Text to go on with";
  prompt.placeholder = chats ? "Write a message" : "Begin a text";
  const limit = get("settings").elements.max_tokens;
  limit.max = model.moesaic.max_model_tokens;
  if (Number(limit.value) > limit.max / 2) limit.value = Math.max(1, Math.floor(limit.max / 2));
  if (!sparse) return;
  // One tile for each expert, in its colour.
  get("tiles")?.replaceChildren(...Array.from({ length: experts }, (_, expert) => {
    const tile = html("i");
    paint(tile, expert);
    return tile;
  }));
  slider.max = layers - 1;
  slider.closest(".layer").classList.toggle("single", layers === 1);
  heat.shape(layers, experts, perToken);
  get("scale-end").textContent = `${+heat.full.toFixed(1)} × fair share`;
  chooseLayer(Math.floor(layers / 2));
  tell();
}

function askForKey(message) {
  get("key-form").hidden = false;
  get("key-error").textContent = message;
  get("key").focus();
}

const wait = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });
let watching = null;

// Follows the engine while the page can be seen; a broken connection is tried again, ever more patiently.
async function watch() {
  if (watching || document.hidden) return;
  const own = watching = new AbortController();
  for (let pause = 1000; watching === own;) {
    try {
      if (!chat.model) showModel((await (await ask("/v1/models", { signal: own.signal })).json()).data[0]);
      for await (const event of events(await ask("/live", { signal: own.signal }))) {
        link.textContent = "live";
        link.className = "soft on";
        pause = 1000;
        picture.take(event);
        showLoad();
      }
    } catch (problem) {
      if (problem.name === "AbortError") return;
      if (problem.status === 401) {
        watching = null;
        link.textContent = "needs a key";
        askForKey(get("key").value ? problem.message : "");
        return;
      }
      link.title = problem.message;
      if (problem.status === undefined) console.error(problem);
    }
    link.textContent = "no connection";
    link.className = "soft off";
    picture.idle();
    await wait(pause);
    pause = Math.min(2 * pause, 15000);
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) watch();
  else {
    watching?.abort();
    watching = null;
  }
});

get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(get("key").value.trim());
  get("key-form").hidden = true;
  watching?.abort();
  watching = null;
  watch();
  prompt.focus();
});

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  chat.send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  chat.send(prompt.value);
});
prompt.addEventListener("input", () => {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideCard();
  chat.stop();
});
get("stop").addEventListener("click", () => chat.stop());
get("new-chat").addEventListener("click", () => chat.reset());
get("show-settings").addEventListener("click", (event) => {
  const open = get("settings").hidden;
  get("settings").hidden = !open;
  event.currentTarget.setAttribute("aria-expanded", `${open}`);
  if (open) get("settings").elements.temperature.focus();
});
get("settings").addEventListener("submit", (event) => event.preventDefault());
slider.addEventListener("input", () => chooseLayer(Number(slider.value)));
get("colours").addEventListener("change", (event) => document.body.classList.toggle("uncoloured", !event.target.checked));
for (const choice of document.querySelectorAll("input[name=period]")) choice.addEventListener("change", showLoad);
// Only who moves over the map by keyboard is told of each cell.
get("map").addEventListener("focus", () => get("readout").setAttribute("aria-live", "polite"));
get("map").addEventListener("blur", () => get("readout").removeAttribute("aria-live"));

watch();
if (matchMedia("(pointer: fine)").matches) prompt.focus();
