// The conversation: what is asked, what is answered, and what went wrong.
import { ApiError, ask, events } from "/page/api.js";
import { Answer, forgetAnswers } from "/page/answer.js";
import { html } from "/page/colour.js";
import { tokensOf } from "/page/routing.js";

const get = (id) => document.getElementById(id);
const log = get("log"), prompt = get("prompt"), error = get("error"), settings = get("settings");
const reasons = { length: "reached the most tokens", stopped: "stopped", error: "ended by an error" };

// Who reads the end goes on seeing it; who has scrolled back is left in peace.
function keepInView(grow) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  grow();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

export class Chat {
  // `onToken` gets each token that has experts, `onPoint` the token under the pointer or null.
  constructor({ onToken, onPoint, onLocked }) {
    Object.assign(this, { onToken, onPoint, onLocked });
    this.model = null;
    this.turns = [];
    this.abort = null;
  }

  get busy() { return this.abort !== null; }
  get continues() { return this.model !== null && !this.model.moesaic.has_chat_template; }

  reset() {
    this.stop();
    this.turns = [];
    forgetAnswers();
    log.replaceChildren(get("welcome") ?? this.welcome);
    this.fail(null);
    prompt.focus();
  }

  stop() { this.abort?.abort(); }

  send(text) {
    if (this.busy || !text.trim() || !settings.reportValidity()) return;
    if (!this.model) {
      this.fail("The server has not told its model yet. Wait a moment, or reload the page.");
      return;
    }
    this.welcome ??= get("welcome");
    this.welcome.remove();
    const question = html("div", { class: "question", dir: "auto" });
    question.textContent = text;
    const element = html("article", { class: this.continues ? "turn text" : "turn" }, question);
    log.append(element);
    const turn = { question: text, element, answer: null };
    this.turns.push(turn);
    prompt.value = "";
    prompt.dispatchEvent(new Event("input"));
    this.run(turn);
  }

  // The last turn once more: another seed, or other settings.
  retry() {
    const turn = this.turns.at(-1);
    if (this.busy || !turn || !settings.reportValidity()) return;
    turn.answer?.forget();
    this.run(turn);
  }

  request(turn) {
    const values = Object.fromEntries(new FormData(settings));
    const body = { model: this.model.id, stream: true, stream_options: { include_usage: true } };
    for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (values[name] !== "") body[name] = Number(values[name]);
    if (this.model.moesaic.num_experts) {
      // Of the answer alone, so that what was said before need not be read again.
      Object.assign(body, { return_routed_experts: true, routed_experts_start_len: -1 });
    }
    // With log-probabilities come the texts of single tokens.
    if (this.continues) return ["/v1/completions", { ...body, logprobs: 0, prompt: turn.question }];
    const messages = values.system.trim() ? [{ role: "system", content: values.system }] : [];
    for (const { question, answer } of this.turns) {
      messages.push({ role: "user", content: question });
      if (answer && answer !== turn.answer) messages.push({ role: "assistant", content: answer.text });
    }
    return ["/v1/chat/completions", { ...body, logprobs: true, messages }];
  }

  async run(turn) {
    const answer = new Answer(this.onPoint, keepInView), times = { begin: performance.now(), first: 0, tokens: 0, reason: "" };
    for (const old of log.querySelectorAll(".meta button")) old.remove();
    turn.element.querySelector(".meta")?.remove();
    turn.answer = answer;
    turn.element.append(answer.element);
    turn.element.setAttribute("aria-busy", "true");
    this.abort = new AbortController();
    this.fail(null);
    this.show();
    log.scrollTop = log.scrollHeight;
    try {
      const [path, body] = this.request(turn);
      for await (const chunk of events(await ask(path, { body, signal: this.abort.signal }))) this.take(chunk, answer, times);
    } catch (problem) {
      times.reason = problem.name === "AbortError" ? "stopped" : "error";
      if (times.reason === "error") this.problem(problem, turn);
    } finally {
      this.abort = null;
      this.end(turn, answer, times);
    }
  }

  take(chunk, answer, times) {
    times.tokens = chunk.usage?.completion_tokens ?? times.tokens;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const text = choice.delta ? choice.delta.content ?? "" : choice.text ?? "", tokens = tokensOf(choice);
    if (!times.first && (text || tokens.length)) times.first = performance.now();
    times.last = performance.now();
    times.reason = choice.finish_reason ?? times.reason;
    answer.push(text, tokens);
    tokens.forEach(this.onToken);
  }

  end(turn, answer, times) {
    turn.element.removeAttribute("aria-busy");
    answer.finish();
    if (this.turns.includes(turn) && turn.answer === answer) this.describe(turn, answer, times);
    this.show();
  }

  describe(turn, answer, times) {
    const facts = [], count = times.tokens || answer.pieces.length;
    if (count) facts.push(`${count} token${count === 1 ? "" : "s"}`);
    if (times.first) {
      const seconds = (times.last - times.first) / 1000;
      if (count > 1 && seconds > 0) facts.push(`${((count - 1) / seconds).toPrecision(3)} tokens/s`);
      facts.push(`first after ${((times.first - times.begin) / 1000).toFixed(2)} s`);
    }
    if (reasons[times.reason]) facts.push(reasons[times.reason]);
    if (!facts.length) facts.push("no text");
    const retry = html("button", { type: "button", class: "plain" }, "Retry");
    retry.addEventListener("click", () => { this.retry(); prompt.focus(); });
    keepInView(() => turn.element.append(html("div", { class: "meta soft" }, facts.join(" · "), retry)));
  }

  // A request that was refused leaves no turn: its text goes back to where it was written.
  problem(problem, turn) {
    const known = problem instanceof ApiError;
    if (!known) console.error(problem);
    if (known && problem.status === 401) this.onLocked(problem.message);
    else this.fail(known ? problem.message : `The page cannot read the answer: ${problem.message}`);
    if (turn.answer.text || !this.turns.includes(turn)) return;
    turn.answer.forget();
    turn.element.remove();
    this.turns.splice(this.turns.indexOf(turn), 1);
    if (!prompt.value) prompt.value = turn.question;
    prompt.dispatchEvent(new Event("input"));
    if (!this.turns.length) log.append(this.welcome);
  }

  fail(message) {
    error.hidden = message === null;
    error.textContent = message ?? "";
  }

  show() {
    // A button that goes hands its focus on.
    const focused = document.activeElement;
    get("send").hidden = this.busy;
    get("stop").hidden = !this.busy;
    if (focused === get("send") && this.busy) get("stop").focus();
    if (focused === get("stop") && !this.busy) prompt.focus();
  }
}
