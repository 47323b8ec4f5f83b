// The text, each token in the colour of its first expert.
const reading = { text: 0, token: 0 };

function drawReading() {
  const { tokens, experts } = report.texts[reading.text], only = byId("only").checked;
  const spans = tokens.map((text, index) => {
    const ids = experts[chosen.layer][index].filter((expert) => expert >= 0), place = ids.indexOf(chosen.expert);
    const visible = text.replace(/\t/g, "⇥\t").replace(/\r?\n/g, "↵\n");
    const span = html("span", { class: "token", "data-token": index }, visible);
    if (only ? place >= 0 : ids.length) span.style.setProperty("--hue", hueOf(only ? chosen.expert : ids[0]));
    else span.classList.add("pale");
    if (only && place > 0) span.classList.add("second");
    if (!only && ids[0] === chosen.expert) span.classList.add("chosen");
    return span;
  });
  byId("reading").replaceChildren(...spans);
  showToken();
}

function showToken() {
  const { tokens, experts } = report.texts[reading.text];
  reading.token = clamp(reading.token, 0, tokens.length - 1);
  byId("reading").querySelector(".here")?.classList.remove("here");
  byId("reading").children[reading.token]?.classList.add("here");
  const ids = experts[chosen.layer][reading.token].filter((expert) => expert >= 0);
  byId("text-readout").replaceChildren(html("b", {}, shown(tokens[reading.token])), ids.length ? " goes to " : " goes nowhere",
    ...ids.flatMap((expert) => [expertButton(chosen.layer, expert), " "]));
}

function setUpReading() {
  if (!report.texts.length) { byId("text").hidden = true; return; }
  const box = byId("reading");
  const { name, value } = mostOneSided();
  if (name === "domain") reading.text = Math.max(0, report.texts.findIndex(({ source }) => source === value));
  choices(byId("text-choice"), report.texts.map(({ source }) => report.sources[source]), (source) => `Text: ${source}`, (index) => { reading.text = index; reading.token = 0; drawReading(); }, reading.text);
  byId("only").addEventListener("change", drawReading);
  const at = (event) => event.target.closest(".token");
  box.addEventListener("pointerover", (event) => { const span = at(event); if (span) { reading.token = +span.dataset.token; showToken(); } });
  const first = () => report.texts[reading.text].experts[chosen.layer][reading.token].find((expert) => expert >= 0);
  const pick = () => { const expert = first(); if (expert !== undefined) choose(chosen.layer, expert); };
  box.addEventListener("click", (event) => { if (at(event)) pick(); });
  arrows(box, (down, right) => { reading.token += right + 8 * down; showToken(); }, pick);
  chosen.listeners.push(drawReading);
}
setUpReading();

// Begin where the address says, or with the expert that leans furthest to one side.
function begin() {
  const place = /^#(\d+)\.(\d+)$/.exec(location.hash);
  if (place) { choose(+place[1], +place[2]); return; }
  const { layer, expert } = mostOneSided();
  choose(layer, expert);
}
begin();
