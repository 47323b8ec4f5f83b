// One answer: its text cut into tokens, each in the colour of an expert.
import { html, paint } from "/page/colour.js";
import { focusCard, hideCard, showCard } from "/page/card.js";

const answers = new Set();
const frame = 30; // milliseconds between two changes of the text, however fast tokens come
const view = { layer: 0, marked: null };

// The expert with most weight; a token may have none in a layer.
export function topExpert(token, layer) {
  const experts = token.experts[layer] ?? [], weights = token.weights?.[layer] ?? [];
  let best = 0;
  for (let index = 1; index < experts.length; index += 1) if ((weights[index] ?? 0) > (weights[best] ?? 0)) best = index;
  return experts[best];
}

export function colourBy(layer) {
  view.layer = layer;
  for (const answer of answers) answer.pieces.forEach((piece) => answer.paint(piece));
}

// Marks the tokens that an expert of a layer computed; null takes the marks away.
export function mark(cell) {
  view.marked = cell;
  document.body.classList.toggle("marking", cell !== null);
  for (const answer of answers) answer.pieces.forEach((piece) => answer.mark(piece));
}

export function forgetAnswers() {
  hideCard();
  answers.clear();
}

// A character may be spread over several tokens; none of them has a text of its own then.
const isWhole = (text) => text !== "" && !text.startsWith("bytes:");

export class Answer {
  // `onPoint` gets the token that is pointed at, or null; `keepInView` runs a function that lets the text grow.
  constructor(onPoint, keepInView) {
    this.text = "";
    this.pieces = [];
    this.waiting = [];
    this.at = 0;
    this.current = -1;
    this.onPoint = onPoint;
    this.keepInView = keepInView;
    this.tail = document.createTextNode("");
    this.element = html("div", { class: "answer", dir: "auto" }, this.tail);
    this.element.addEventListener("pointerover", (event) => this.pointed(event, false));
    this.element.addEventListener("pointerout", () => hideCard(false));
    this.element.addEventListener("click", (event) => this.pointed(event, true));
    this.element.addEventListener("keydown", (event) => this.walk(event));
    this.element.addEventListener("blur", () => hideCard(false));
    answers.add(this);
  }

  push(text, tokens) {
    this.text += text;
    this.waiting.push(...tokens);
    this.timer ??= setTimeout(() => this.settle(false), frame);
  }

  // Nothing more comes: what is left of the text is shown, and tokens without text are dropped.
  finish() {
    this.settle(true);
    this.waiting = [];
    if (!this.pieces.length) return;
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", `Answer of ${this.pieces.length} tokens; the left and right arrow keys tell the experts of each`);
  }

  forget() {
    answers.delete(this);
    this.element.remove();
  }

  settle(last) {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.keepInView(() => this.write(last));
  }

  write(last) {
    for (let piece = this.next(last); piece; piece = this.next(last)) {
      const tokens = this.waiting.splice(0, piece.count);
      const text = this.text.slice(this.at, this.at + piece.length);
      this.at += piece.length;
      if (text) this.add(text, tokens.at(-1));
    }
    this.tail.data = this.text.slice(this.at);
  }

  // How many of the waiting tokens make the next piece of text, and its length. Text may come later than its tokens:
  // then there is no next piece yet.
  next(last) {
    const rest = this.text.slice(this.at), tokens = this.waiting;
    if (!rest || !tokens.length) return null;
    if (isWhole(tokens[0].text)) {
      // Many tokenizers begin a text with a space that is no part of it.
      const text = this.at === 0 && !rest.startsWith(tokens[0].text) ? tokens[0].text.trimStart() : tokens[0].text;
      if (text && rest.startsWith(text)) return { count: 1, length: text.length };
      if (!last && tokens[0].text.startsWith(rest)) return null;
    }
    for (let count = 1; count < tokens.length; count += 1) {
      const length = isWhole(tokens[count].text) ? rest.indexOf(tokens[count].text) : -1;
      if (length >= 0) return { count, length };
    }
    return last ? { count: tokens.length, length: rest.length } : null;
  }

  add(text, token) {
    // The space before a word stays uncoloured: words look like tiles, and none begins at the end of a line.
    const word = text.trimStart() || text, span = html("span", { class: "token" }, word);
    this.tail.before(text.slice(0, text.length - word.length));
    const piece = { span, token: { ...token, text } };
    span.dataset.index = `${this.pieces.length}`;
    this.pieces.push(piece);
    this.paint(piece);
    this.mark(piece);
    this.tail.before(span);
  }

  paint({ span, token }) {
    const expert = topExpert(token, view.layer);
    span.classList.toggle("coloured", expert !== undefined);
    if (expert !== undefined) paint(span, expert);
  }

  mark({ span, token }) {
    const hit = view.marked && (token.experts[view.marked.layer] ?? []).includes(view.marked.expert);
    span.classList.toggle("marked", Boolean(hit));
  }

  pointed(event, pinned) {
    const span = event.target.closest(".token");
    if (span && (pinned || event.pointerType !== "touch")) this.show(Number(span.dataset.index), pinned);
  }

  show(index, pinned) {
    const piece = this.pieces[index];
    const closed = () => {
      piece.span.classList.remove("current");
      this.onPoint(null);
    };
    if (!showCard(piece.token, view.layer, piece.span, pinned, closed)) return;
    piece.span.classList.add("current");
    this.current = index;
    this.onPoint(piece.token);
  }

  walk(event) {
    if (event.key === "Enter" && this.current >= 0) {
      this.show(this.current, true);
      focusCard(this.element);
      return;
    }
    const moves = { ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: this.pieces.length - 1 };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(this.pieces.length - 1, moves[event.key]));
    this.show(index, false);
    this.pieces[index].span.scrollIntoView({ block: "nearest" });
  }
}
