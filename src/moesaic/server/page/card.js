// The card of a token: for each layer a bar of its experts, as wide as their weights.
import { html, paint } from "/page/colour.js";

const card = document.getElementById("card");
const state = { pinned: false, closed: null };

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const share = (weight) => (weight >= 0.0995 ? weight.toFixed(2) : weight.toFixed(3)).replace(/^0/, "");

function sorted(token, layer) {
  const weights = token.weights?.[layer] ?? [];
  return (token.experts[layer] ?? []).map((expert, index) => ({ expert, weight: weights[index] ?? 0 })).sort((a, b) => b.weight - a.weight);
}

function row(token, layer, chosen) {
  const parts = sorted(token, layer), sum = parts.reduce((total, part) => total + Math.max(part.weight, 0), 0);
  const says = parts.map(({ expert, weight }) => `expert ${expert} ${share(weight)}`).join(", ") || "no expert";
  const bar = html("span", { class: "mixture", "aria-hidden": "true" });
  for (const { expert, weight } of parts) {
    const width = sum > 0 ? Math.max(weight, 0) / sum : 1 / parts.length;
    // About 17 rem for the bar; a number needs 1.7, a weight 2.4 more.
    const name = width * 17 > 4.6 ? `${expert} · ${share(weight)}` : width * 17 > 1.7 ? `${expert}` : "";
    const part = html("span", { title: `expert ${expert}: ${share(weight)}` }, name);
    part.style.flexGrow = `${width}`;
    paint(part, expert);
    bar.append(part);
  }
  return html("li", chosen ? { class: "chosen" } : {}, html("span", { class: "hidden" }, `Layer ${layer}: ${says}`),
    html("span", { class: "number", "aria-hidden": "true" }, `${layer}`), bar);
}

// False where a pinned card stays.
export function showCard(token, layer, anchor, pinned, closed) {
  if (state.pinned && !pinned) return false;
  hideCard();
  state.pinned = pinned;
  state.closed = closed;
  const best = sorted(token, layer).map(({ expert, weight }) => `${expert} (${share(weight)})`).join(", ");
  const close = html("button", { type: "button", "aria-label": "Close the card" }, "Close");
  close.addEventListener("click", () => hideCard());
  const hint = html("p", { class: "soft small" }, "Click the token, or press Enter, to keep this card.");
  const rows = token.experts.map((_, index) => row(token, index, index === layer));
  card.replaceChildren(
    html("div", { class: "bar" }, html("b", { class: "mono" }, visible(token.text)), ...(pinned ? [close] : [])),
    html("p", { class: "small" }, html("span", { class: "soft" }, `Layer ${layer}, experts and weights: `), best || "none"),
    html("ol", pinned ? { tabindex: "0", "aria-label": "Experts of each layer" } : { "aria-label": "Experts of each layer" }, ...rows));
  card.classList.toggle("pinned", pinned);
  card.hidden = false;
  const list = card.querySelector("ol"), chosen = card.querySelector(".chosen");
  if (chosen) list.scrollTop = Math.max(0, layer - 5) * chosen.offsetHeight;
  if (!pinned && list.scrollHeight > list.clientHeight) card.append(hint);
  place(anchor);
  return true;
}

// To read a long card by keyboard; closing it leads back.
export function focusCard(origin) {
  const closed = state.closed;
  state.closed = () => {
    closed();
    origin.focus();
  };
  card.querySelector("ol").focus();
}

// Below the token, or above it where there is more room; narrow screens show it at their foot.
function place(anchor) {
  if (matchMedia("(max-width: 40rem)").matches) {
    card.style.left = card.style.top = "";
    return;
  }
  const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect(), gap = 8;
  const below = window.innerHeight - at.bottom, fits = below > card.offsetHeight + gap || below > at.top;
  card.style.left = `${Math.max(gap, Math.min(at.left, window.innerWidth - card.offsetWidth - gap))}px`;
  card.style.top = `${Math.max(gap, fits ? at.bottom + gap : at.top - card.offsetHeight - gap)}px`;
}

// A pinned card stays until it is closed by hand.
export function hideCard(byHand = true) {
  if (card.hidden || (state.pinned && !byHand)) return false;
  state.pinned = false;
  card.hidden = true;
  const closed = state.closed;
  state.closed = null;
  closed?.();
  return true;
}

document.addEventListener("pointerdown", (event) => {
  if (state.pinned && !card.contains(event.target) && !event.target.closest?.(".token")) hideCard();
});
