// The moving chart of steps: times above, rows by kind below.

import { canvas, ceiling, color, grid } from "./chart.js";

const LONGEST_MS = 60_000, SHORTEST_MS = 10_000, LEFT = 62, MOST = 12_000;

export class StepChart {
  /** ``chosen(step)`` is called with the step that a reader chooses. */
  constructor(times, rows, chosen) {
    this.steps = [];
    this.now = 0;
    this.step = null;
    this.times = times;
    this.chosen = chosen;
    this.drawTimes = canvas(times, (...at) => this.#times(...at));
    this.drawRows = canvas(rows, (...at) => this.#rows(...at));
    times.addEventListener("click", (event) => this.#choose(this.#nearest(event.offsetX)));
    times.addEventListener("keydown", (event) => this.#key(event));
  }

  draw() {
    this.drawTimes();
    this.drawRows();
  }

  clear() {
    this.steps = [];
    this.step = null;
  }

  /** Columns of new steps, and the server's time now. */
  add(columns, now) {
    const { number, at_ms, predicted_ms, bound_ms, actual_ms, prefill_tokens, draft_tokens, own_tokens, committed } = columns;
    number.forEach((n, i) => this.steps.push({
      number: n, at: at_ms[i], predicted: predicted_ms[i], bound: bound_ms[i], actual: actual_ms[i],
      prefill: prefill_tokens[i], drafts: draft_tokens[i], own: own_tokens[i], committed: committed[i],
    }));
    this.now = now;
    const old = this.steps.findIndex((one) => one.at > now - 2 * LONGEST_MS);
    this.steps.splice(0, Math.max(old, this.steps.length - MOST, 0));
    this.draw();
  }

  /** How far back the chart reaches: up to a minute, less while there is less to show. */
  get window() {
    return Math.min(LONGEST_MS, Math.max(SHORTEST_MS, this.now - (this.steps[0]?.at ?? this.now)));
  }

  /** Steps of the last ``ms``, the oldest first. */
  recent(ms) {
    let first = this.steps.length;
    while (first > 0 && this.steps[first - 1].at > this.now - ms) first -= 1;
    return this.steps.slice(first);
  }

  #x(at, width) {
    return LEFT + (1 - (this.now - at) / this.window) * (width - LEFT);
  }

  #nearest(x) {
    const width = this.times.clientWidth, shown = this.recent(this.window);
    return shown.reduce((best, one) => (best && Math.abs(this.#x(best.at, width) - x) <= Math.abs(this.#x(one.at, width) - x) ? best : one), null);
  }

  #key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") return this.#choose(null);
    if (!move || !this.steps.length) return undefined;
    event.preventDefault();
    const at = this.steps.indexOf(this.step);
    return this.#choose(this.steps[at < 0 ? this.steps.length - 1 : Math.min(this.steps.length - 1, Math.max(0, at + move))]);
  }

  #choose(step) {
    this.step = step;
    this.draw();
    this.chosen(step);
  }

  #seconds(context, width, y) {
    context.fillStyle = color("muted");
    context.textBaseline = "alphabetic";
    const seconds = Math.round(this.window / 1000);
    for (const [share, words] of [[0, `${seconds} s ago`], [0.5, `${Math.round(seconds / 2)} s`], [1, "now"]]) {
      context.textAlign = share === 1 ? "right" : share ? "center" : "left";
      context.fillText(words, LEFT + share * (width - LEFT), y);
    }
  }

  #times(context, width, height) {
    const shown = this.recent(this.window), top = 10, high = height - top - 22;
    const sorted = shown.map((one) => Math.max(one.actual, one.bound)).sort((a, b) => a - b);
    // One slow step must not flatten the others: what is beyond the limit stands at the edge.
    const limit = ceiling(Math.max(1, 1.15 * (sorted[Math.floor(0.98 * (sorted.length - 1))] ?? 1)));
    const y = (value) => top + high - (Math.min(value, limit) / limit) * high;
    grid(context, LEFT, top, width - LEFT, high, limit, "ms", 4);
    this.#seconds(context, width, height - 4);
    const runs = shown.filter((one) => one.predicted > 0);
    context.fillStyle = color("s-verify");
    context.strokeStyle = color("s-verify");
    context.globalAlpha = 0.2;
    context.beginPath();
    for (const one of runs) context.lineTo(this.#x(one.at, width), y(one.bound));
    for (const one of runs.toReversed()) context.lineTo(this.#x(one.at, width), y(one.predicted));
    context.fill();
    context.globalAlpha = 1;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const one of runs) context.lineTo(this.#x(one.at, width), y(one.predicted));
    context.stroke();
    const ink = color("ink"), red = color("red");
    for (const one of shown) {
      const x = this.#x(one.at, width), over = one.bound > 0 && one.actual > one.bound;
      if (over) {
        context.strokeStyle = red;
        context.beginPath();
        context.arc(x, y(one.actual), 3, 0, 7);
        context.stroke();
      } else {
        context.fillStyle = ink;
        context.fillRect(x - 1, y(one.actual) - 1, 2, 2);
      }
    }
    if (this.step && this.step.at > this.now - this.window) {
      const x = this.#x(this.step.at, width);
      context.strokeStyle = color("blue");
      context.strokeRect(x - 5, y(this.step.actual) - 5, 10, 10);
    }
  }

  #rows(context, width, height) {
    const shown = this.recent(this.window), top = 8, high = height - top - 6;
    const limit = ceiling(Math.max(4, ...shown.map((one) => one.prefill + one.drafts + one.own)));
    grid(context, LEFT, top, width - LEFT, high, limit, "rows", 2);
    // A bar for every other pixel: the mean of its steps.
    const bars = new Map();
    for (const one of shown) {
      const x = 2 * Math.floor(this.#x(one.at, width) / 2), bar = bars.get(x) ?? [0, 0, 0, 0];
      [1, one.own, one.drafts, one.prefill].forEach((value, i) => { bar[i] += value; });
      bars.set(x, bar);
    }
    const colors = ["s-verify", "s-draft", "s-queue"].map(color);
    for (const [x, [count, ...kinds]] of bars) {
      let y = top + high;
      kinds.forEach((value, i) => {
        const size = (value / count / limit) * high;
        context.fillStyle = colors[i];
        context.fillRect(Math.max(LEFT, x), y - size, 2, size);
        y -= size;
      });
    }
  }
}
