// The playground: conversation, drafting switch, link state.

import { Answer, hideTip } from "./answer.js";
import { byId, el, ms, number, percent, serverEvents, setText } from "./dom.js";
import { Rounds } from "./rounds.js";

const EXAMPLES = ["Explain speculative decoding to a colleague.", "Write a function that reverses a list.", "def fibonacci(n):"];
const STATES = {
  ok: ["ok", "linked"],
  reconnecting: ["wait", "server lost, reconnecting"],
  unavailable: ["bad", "no server"],
  gone: ["bad", "the edge does not answer"],
};
const rounds = new Rounds(byId("rounds"), byId("round-rows"));
let messages = [], answer = null, request = null, id = "", failed = "";

// --- status ---

async function poll() {
  if (!document.hidden) {
    try {
      showStatus(await (await fetch("/playground/status")).json());
    } catch {
      setLink("gone", "");
    }
  }
  setTimeout(poll, 2000);
}

function setLink(state, more) {
  const [kind, words] = STATES[state] ?? STATES.gone;
  byId("link").className = `state ${kind}`;
  setText("link", more ? `${words}, ${more}` : words);
  answer?.element.classList.toggle("waiting", state !== "ok");
}

function showStatus(status) {
  setLink(status.status, status.status === "ok" ? ms(status.rtt_ms) : "");
  setText("who", status.target);
  byId("who").title = status.target;
  setText("rtt", ms(status.rtt_ms));
  setText("draft", status.drafter === "none" ? "none (server-only)" : `${status.drafter}, ${status.controller}`);
  byId("draft").title = status.draft;
  setText("server", status.server);
  byId("max-tokens").placeholder = status.max_tokens;
  if (!status.energy) setText("energy", "no sensor");
  byId("drafting").disabled = status.drafter === "none";
  if (status.drafter === "none") byId("drafting").checked = false;
  byId("energy").title = status.energy_sensor;
}

// --- a chat ---

function ask(text) {
  byId("empty").hidden = true;
  messages.push({ role: "user", content: text });
  const message = el("article", { className: "message" }, el("div", { className: "question" }, text));
  byId("log").append(message);
  write(message);
}

function body() {
  const wanted = [...messages], system = byId("system").value, seed = byId("seed").value, top = Number(byId("top").value);
  if (system) wanted.unshift({ role: "system", content: system });
  const made = { messages: wanted, temperature: Number(byId("temperature").value) }, most = byId("max-tokens").value;
  if (most !== "") made.max_tokens = Number(most);
  if (seed !== "") made.seed = Number(seed);
  return top ? { ...made, logprobs: true, top_logprobs: top } : made;
}

async function write(message) {
  const now = (answer = new Answer(message)), foot = el("p", { className: "foot" });
  message.append(foot);
  request = new AbortController();
  id = failed = "";
  byId("notice").hidden = true;
  setText("send", "Stop");
  setText("spoken", "Writing.");
  rounds.begin();
  try {
    const url = `/playground/chat?drafting=${byId("drafting").checked}`;
    const response = await fetch(url, { method: "POST", body: JSON.stringify(body()), signal: request.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const [name, data] of serverEvents(response)) take(now, foot, name, data);
    if (!now.ended) throw new Error("The edge ended the answer early.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!stopped) complain(error instanceof TypeError ? "The edge cannot be reached." : error.message);
    foot.append(stopped ? "stopped" : el("span", { className: "fault" }, "incomplete"));
  }
  now.end();
  if (answer !== now) return;
  if (now.text) messages.push({ role: "assistant", content: now.text });
  answer = request = null;
  setText("send", "Send");
}

function take(now, foot, name, data) {
  if (name === "start") id = data.id;
  else if (name === "round") keepAtEnd(() => {
    const place = rounds.add(data);
    for (const token of data.tokens) now.add({ ...token, round: place });
    now.pending(data.pending);
  });
  else if (name === "text") now.add({ text: data.text, origin: "target", round: 0 });
  else if (name === "pending") now.pending(data.text);
  else if (name === "link") setLink(data.status, "");
  else if (name === "error") throw new Error(data.message);
  else if (name === "end") {
    now.ended = true;
    finish(foot, data);
  }
}

function finish(foot, { finish_reason, verified, usage, stats }) {
  const parts = [`${usage.completion_tokens} tokens`, `${number(stats.tokens_per_s)} tokens/s`];
  if (stats.accepted) parts.push(`${percent(stats.accepted / stats.tokens)} drafted here`);
  if (finish_reason === "length") parts.push("cut at the length limit");
  foot.replaceChildren(parts.join(" · "));
  if (!verified) foot.append(" · ", el("span", { className: "fault" }, "not verified by a server"));
  setText("ttft", ms(stats.ttft_ms));
  setText("per-round", `${number(stats.accepted_per_round)} of ${number(stats.verified_drafts / Math.max(1, stats.rounds))}`);
  setText("wasted", stats.draft_ms ? `${ms(stats.wasted_ms)} (${percent(stats.wasted_ms / stats.draft_ms)})` : "–");
  if (stats.energy_j_per_token !== null) setText("energy", `${number(stats.energy_j_per_token)} J/token`);
  setText("note", stats.draft_note);
  rounds.describe();
  setText("spoken", `Answer complete: ${parts.join(", ")}.`);
}

function complain(text) {
  setText("notice-text", text);
  byId("notice").hidden = false;
}

/** Follow the text, unless the reader has scrolled up. */
function keepAtEnd(change) {
  const inner = byId("log"), log = inner.scrollHeight > inner.clientHeight ? inner : document.scrollingElement;
  const end = inner.getBoundingClientRect().bottom;
  const follow = log === inner ? log.scrollHeight - log.scrollTop - log.clientHeight < 60 : end < innerHeight + 60;
  change();
  if (!follow) return;
  if (log === inner) log.scrollTop = log.scrollHeight;
  else answer?.element.scrollIntoView({ block: "end" });
}

function startAgain() {
  request?.abort();
  messages = [];
  answer = request = null;
  for (const old of document.querySelectorAll(".message")) old.remove();
  byId("empty").hidden = false;
  byId("notice").hidden = true;
  setText("send", "Send");
  hideTip();
  rounds.clear();
  byId("text").focus();
}

// --- controls ---

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (request) return request.abort();
  const text = byId("text").value.trim();
  if (!text) return;
  byId("text").value = "";
  ask(text);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!request) byId("ask").requestSubmit();
});
byId("drafting").addEventListener("change", async (event) => {
  rounds.switched();
  if (!id || !request) return;
  const wanted = { id, drafting: event.target.checked };
  try {
    await fetch("/playground/drafting", { method: "POST", body: JSON.stringify(wanted) });
  } catch { /* the status line says that the edge is gone */ }
});
byId("new").addEventListener("click", startAgain);
byId("again").addEventListener("click", () => {
  const last = [...document.querySelectorAll(".message")].pop();
  if (!last || request) return;
  for (const old of last.querySelectorAll(".answer, .foot")) old.remove();
  if (messages.at(-1)?.role === "assistant") messages.pop();
  write(last);
});
document.addEventListener("scroll", hideTip, { capture: true, passive: true });
byId("examples").append(
  ...EXAMPLES.map((text) => {
    const button = el("button", { type: "button" }, text);
    button.addEventListener("click", () => ask(text));
    return button;
  }),
);
if (matchMedia("(min-width: 901px)").matches) byId("text").focus();
poll();
