// One answer: tokens as spans, in prose and code blocks, with their origins.

import { byId, el, number, percent } from "./dom.js";

const FENCE = "```";
const WORDS = {
  accepted: "Drafted here, accepted by the target",
  matched: "The target’s own; an unverified draft was the same",
  target: "The target’s own",
  unverified: "Drafted here; no server verified it",
};

export class Answer {
  /** ``place``: the element that gets the answer. */
  constructor(place) {
    this.body = el("div", { className: "body" });
    this.pendingText = el("span", { className: "pending", "aria-hidden": "true" });
    this.element = el("div", { className: "answer writing", tabIndex: 0, role: "group", "aria-label": "Answer" }, this.body);
    place.append(this.element);
    this.text = "";
    this.spans = [];
    this.active = -1;
    this.inCode = false;
    this.line = [];
    this.lineText = "";
    this.#newBlock("prose");
    this.element.addEventListener("pointerover", (event) => this.#point(event.target));
    this.element.addEventListener("pointerleave", hideTip);
    this.element.addEventListener("click", (event) => this.#point(event.target));
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.element.addEventListener("blur", () => this.#activate(-1));
  }

  #newBlock(kind) {
    this.block = el("div", { className: kind });
    this.body.append(this.block);
  }

  add(token) {
    this.pendingText.remove();
    // A span never crosses a line, so a code fence can take its line along.
    for (const part of token.text.split(/(?<=\n)/)) if (part) this.#part(part, token);
    this.text += token.text;
  }

  #part(text, token) {
    const span = el("span", { className: `t ${token.origin}` }, text);
    span.token = token;
    this.block.append(span);
    this.spans.push(span);
    const before = this.lineText.startsWith(FENCE);
    this.line.push(span);
    this.lineText += text;
    if (!before && !this.inCode && this.lineText.startsWith(FENCE)) {
      this.#newBlock("code");
      this.block.append(...this.line);
      this.inCode = "opening";
    }
    if (!text.endsWith("\n")) return;
    if (this.inCode === "open" && this.lineText.startsWith(FENCE)) {
      this.inCode = false;
      this.#newBlock("prose");
    } else if (this.inCode === "opening") this.inCode = "open";
    this.line = [];
    this.lineText = "";
  }

  pending(text) {
    this.pendingText.textContent = text;
    if (text) this.block.append(this.pendingText);
    else this.pendingText.remove();
  }

  end() {
    this.pending("");
    this.element.classList.remove("writing", "waiting");
  }

  #point(target) {
    if (target.token) showTip(target, target.token);
    else hideTip();
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.#activate(-1);
    if (!step || !this.spans.length) return;
    event.preventDefault();
    this.#activate(Math.min(this.spans.length - 1, Math.max(0, this.active + step)));
  }

  #activate(index) {
    this.spans[this.active]?.classList.remove("here");
    this.active = index;
    const span = this.spans[index];
    if (!span) return hideTip();
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    showTip(span, span.token);
    byId("spoken").textContent = byId("tip").textContent;
  }
}

const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"') || "(no text yet)";

function showTip(span, token) {
  const tip = byId("tip"), lines = [];
  lines.push(el("p", {}, el("code", {}, visible(token.text))), el("p", { className: "what" }, WORDS[token.origin]));
  if (token.draft !== undefined) lines.push(el("p", {}, "This device drafted ", el("code", {}, visible(token.draft)), " instead."));
  const rows = [];
  if (token.acceptance_prob !== undefined) rows.push(["expected acceptance", percent(token.acceptance_prob)]);
  for (const [text, prob] of token.alternatives ?? []) rows.push([`also drafted ${visible(text)}`, percent(prob)]);
  if (token.prob !== undefined) rows.push(["target’s probability", percent(token.prob)]);
  for (const [text, prob] of token.top ?? [])
    if (text !== token.text) rows.push([visible(text), prob < 0.01 ? "< 1 %" : percent(prob)]);
  rows.push(["round", number(token.round, 0)]);
  lines.push(el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  tip.replaceChildren(...lines);
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const above = box.bottom + size.height + 8 > innerHeight && box.top > size.height + 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${above ? box.top - size.height - 6 : box.bottom + 6}px`;
}

export function hideTip() {
  byId("tip").hidden = true;
}
