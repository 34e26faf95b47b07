// Rounds of the answers: counts, speeds, and the strip of the last ones.

import { canvas, ceiling, color, grid } from "./chart.js";
import { byId, fillTable, number, setText } from "./dom.js";

const SHOWN = 64, LISTED = 12;
const PARTS = ["draft", "link", "queue", "verify"];
const KINDS = ["accepted", "target", "matched", "unverified"];

export class Rounds {
  constructor(place, rows) {
    this.rows = rows;
    this.place = place;
    this.redraw = canvas(place, (...at) => this.#draw(...at));
    this.clear();
  }

  clear() {
    this.last = [];
    this.count = 0;
    this.kinds = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
    this.speed = { true: { tokens: 0, ms: 0 }, false: { tokens: 0, ms: 0 } };
    this.rows.replaceChildren();
    this.begin();
    this.#show();
  }

  /** An answer begins: the wait for its first token is no decoding time. */
  begin() {
    this.skip = true;
  }

  /** Drafting was switched: the session is opened again, which is no decoding time either. */
  switched() {
    this.skip = true;
  }

  /** Take a round in; returns its number. */
  add(round) {
    this.count += 1;
    // The legend counts what can be seen: the token that ends a text shows nothing.
    for (const token of round.tokens) if (token.text) this.kinds[token.origin] += 1;
    const same = this.before === round.drafting;
    if (!this.skip && same) {
      const speed = this.speed[round.drafting];
      speed.tokens += round.tokens.length;
      speed.ms += round.round_ms;
    }
    this.skip = false;
    this.before = round.drafting;
    const { draft_ms, rtt_ms, queue_ms, verify_ms, accepted, drafted, drafting } = round;
    this.last.push({ number: this.count, draft: draft_ms, link: rtt_ms, queue: queue_ms, verify: verify_ms,
      tokens: round.tokens.length, accepted, drafted, drafting });
    if (this.last.length > SHOWN) this.last.shift();
    this.#show();
    return this.count;
  }

  #show() {
    this.dirty ??= requestAnimationFrame(() => {
      this.dirty = undefined;
      for (const kind of KINDS) setText(`n-${kind}`, String(this.kinds[kind]));
      this.#speeds();
      this.redraw();
      fillTable(this.rows, this.last.slice(-LISTED).reverse().map((r) => [
        String(r.number), ...PARTS.map((part) => ({ n: number(r[part], 1) })), { n: String(r.tokens) },
        { n: `${r.accepted}/${r.drafted}` }]));
    });
  }

  #speeds() {
    const [fast, slow] = [true, false].map((on) => {
      const { tokens, ms } = this.speed[on];
      return tokens > 3 && ms > 0 ? (1000 * tokens) / ms : NaN;
    });
    const top = Math.max(fast || 0, slow || 0);
    for (const [name, value] of [["fast", fast], ["slow", slow]]) {
      setText(name, number(value));
      byId(`${name}-bar`).setAttribute("width", value ? String((100 * value) / top) : "0");
    }
    let words = "Turn drafting off while it writes to compare.";
    if (fast && slow) {
      words = fast >= slow ? `Drafting makes it ${number(fast / slow)} times as fast.`
        : `Drafting does not pay here: the server alone is ${number(slow / fast)} times as fast.`;
    } else if (slow) words = "Turn drafting on while it writes to compare.";
    byId("ratio").firstElementChild.textContent = words;
  }

  #draw(context, width, height) {
    const left = 54, bottom = 14, top = 8, high = height - top - bottom, bar = (width - left) / SHOWN;
    const limit = ceiling(Math.max(10, ...this.last.map((r) => PARTS.reduce((sum, part) => sum + r[part], 0))));
    grid(context, left, top, width - left, high, limit, "ms");
    const colors = Object.fromEntries(PARTS.map((part) => [part, color(`s-${part}`)])), off = color("line");
    this.last.forEach((round, i) => {
      let y = top + high;
      for (const part of PARTS) {
        const size = (round[part] / limit) * high;
        context.fillStyle = colors[part];
        context.fillRect(left + i * bar + 0.5, y - size, Math.max(1, bar - 1), size);
        y -= size;
      }
      context.fillStyle = round.drafting ? colors.draft : off;
      context.fillRect(left + i * bar + 0.5, height - bottom + 5, Math.max(1, bar - 1), 4);
    });
  }

  /** Words for those who do not see the strip. */
  describe() {
    const mean = (part) => this.last.reduce((sum, r) => sum + r[part], 0) / Math.max(1, this.last.length);
    const words = PARTS.map((part) => `${part} ${number(mean(part), 1)} ms`).join(", ");
    this.place.setAttribute("aria-label", `Mean of the last ${this.last.length} rounds: ${words}`);
  }
}
