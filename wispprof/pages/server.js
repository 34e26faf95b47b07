// The server's page: asks once a second, and not at all while it is paused or hidden.

import { canvas, ceiling, color } from "./chart.js";
import { byId, el, fillTable, ms, number, percent, setText } from "./dom.js";
import { StepChart } from "./step_chart.js";

const TICK_MS = 1000, WINDOW_MS = 5000, LISTED = 20;
const REASONS = {
  epoch: "came after the text had gone another way", contradiction: "differed from committed text",
  gap: "began beyond the pending drafts", conflict: "differed from pending drafts", overflow: "beyond the limit",
  finished: "came after the end",
};
const count = (value) => ({ n: number(value, 0) });
let next = 0, run = "", wholeFrom = 0, paused = false, key = sessionStorage.getItem("wispprof key") ?? "", lastSessions = null;

const chart = new StepChart(byId("steps"), byId("rows"), showStep);
const drawSlack = canvas(byId("slack"), slackStrip);

// --- asking ---

async function ask(path) {
  const response = await fetch(path, { headers: key ? { authorization: `Bearer ${key}` } : {} });
  if (response.status === 401) throw new Denied();
  return response;
}

class Denied extends Error {}

async function tick() {
  let wait = TICK_MS;
  if (!paused && !document.hidden) {
    try {
      show(await (await ask(`/dashboard?since=${next}`)).json());
    } catch (error) {
      if (error instanceof Denied) return askForKey();
      setState("bad", "the server does not answer");
      wait = 2000;
    }
  }
  return setTimeout(tick, wait);
}

function askForKey() {
  byId("login-fault").hidden = !key;
  byId("login").hidden = false;
  byId("main").hidden = true;
  setState("wait", "locked");
  byId("key").focus();
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  sessionStorage.setItem("wispprof key", key);
  byId("login").hidden = true;
  tick().then(openPermalink);
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  setText("pause", paused ? "Go on" : "Pause");
  if (paused) setState("wait", "paused");
});

async function download(event, path, type, file) {
  if (!key) return;
  event.preventDefault(); // A link cannot carry the key.
  const data = new Blob([await (await ask(path)).text()], { type });
  const link = el("a", { href: URL.createObjectURL(data), download: file });
  link.click();
  URL.revokeObjectURL(link.href);
}
byId("json").addEventListener("click", (event) => download(event, "/dashboard", "application/json", "dashboard.json"));
byId("metrics").addEventListener("click", (event) => download(event, "/metrics", "text/plain", "metrics.txt"));

// --- showing ---

function setState(kind, words) {
  byId("state").className = `state ${kind}`;
  setText("state", words);
}

function show(data) {
  if (run && data.run !== run) chart.clear();
  run = data.run;
  next = data.steps.next;
  byId("main").hidden = false;
  setState(data.state === "ok" ? "ok" : "bad", data.state === "ok" ? "serving" : data.state);
  setText("what", `${data.target} · ${data.policy}, ${data.asynchronous ? "asynchronous" : "synchronous"}`);
  setText("version", `wispprof ${data.version}`);
  chart.add(data.steps, data.now_ms);
  if (data.steps.every > 1) wholeFrom = data.now_ms; // Sums over thinned steps would be too small.
  figures(data);
  const alarm = data.drift.re_profile ? data.drift.reason : "";
  byId("alarm").hidden = !alarm;
  setText("alarm", alarm);
  fillTable(byId("classes"), data.classes.map((one) => [
    one.class, count(one.open), { n: one.slack_ms === null ? "–" : ms(one.slack_ms) }, count(one.unreachable), count(one.met),
    count(one.missed), { n: percent(one.met / (one.met + one.missed)) }]));
  fillTable(byId("kinds"), data.kinds.map((one) => [
    one.kind, count(one.open), count(one.drafting), { n: percent(one.accepted / one.drafted) }, count(one.tokens)]));
  drafts(data.drafts);
  sessions((lastSessions = data.sessions));
  drawSlack();
  stepRows();
}

function figures({ refused, sessions, waiting, estimator, kv, load_level, drift, classes, plan_row }) {
  const recent = chart.recent(WINDOW_MS).filter((one) => one.at > wholeFrom), sum = (of) => recent.reduce((total, one) => total + of(one), 0);
  const span = recent.length ? chart.now - recent[0].at + recent[0].actual : NaN;
  const middle = recent.map((one) => one.actual).sort((a, b) => a - b)[recent.length >> 1];
  setText("f-sessions", number(sessions.all, 0));
  setText("f-waiting", waiting ? `${waiting} wait for memory` : "none waits for memory");
  setText("f-speed", number((1000 * sum((one) => one.committed)) / span, 0));
  setText("f-per-step", recent.length ? `${number(sum((one) => one.committed) / recent.length, 1)} a step` : "no step");
  setText("f-step", ms(middle));
  setText("f-busy", recent.length ? `engine ${percent(Math.min(1, sum((one) => one.actual) / span))} busy` : "");
  const bounded = recent.filter((one) => one.bound > 0);
  setText("f-over", percent(bounded.filter((one) => one.actual > one.bound).length / bounded.length));
  setText("f-estimator", `${estimator === "learning" ? "learns its own steps" : "fitted estimator"}${plan_row ? `, plan row ${plan_row}` : ""}`);
  const met = classes.reduce((all, one) => all + one.met, 0), missed = classes.reduce((all, one) => all + one.missed, 0);
  setText("f-attainment", percent(met / (met + missed)));
  const turnedAway = Object.values(refused).reduce((all, one) => all + one, 0);
  setText("f-ended", `${number(met + missed, 0)} ended${turnedAway ? `, ${number(turnedAway, 0)} refused` : ""}`);
  setText("f-kv", percent(1 - kv.free / kv.total));
  setText("f-kv-more", `of ${number(kv.total, 0)} tokens`);
  setText("f-load", String(load_level));
  setText("f-drift", number(drift.ratio, 2));
  setText("f-bound", drift.bound_scale === null ? "no drift monitor" : `after correction; bound × ${number(drift.bound_scale, 2)}`);
}

function drafts({ drafted, accepted, matched, wasted, cut, dropped }) {
  const rows = [
    ["drafted", drafted], ["accepted", accepted], ["committed before they were verified", matched], ["contradicted or withdrawn", wasted],
  ];
  const beside = [
    ["left out of a step by the policy, once or more", cut],
    ...Object.entries(dropped).map(([reason, tokens]) => [`refused: ${REASONS[reason] ?? reason}`, tokens]),
  ];
  fillTable(byId("drafts"), [
    ...rows.map(([name, tokens]) => [name, count(tokens), { n: percent(tokens / drafted) }]),
    ...beside.map(([name, tokens]) => [`beside: ${name}`, count(tokens), { n: "" }]),
  ]);
}

function sessions(of) {
  setText("sessions-shown", of.all > of.session.length ? `${of.session.length} of ${of.all}, least slack first` : "least slack first");
  fillTable(byId("sessions"), of.session.map((name, i) => {
    const slack = of.slack_ms[i];
    return [name, of.kind[i], of.class[i], { n: slack === null ? "–" : el("span", { className: slack < 0 ? "late" : "" }, number(slack, 0)) },
      count(of.generated[i]), count(of.context[i]), count(of.pending[i]), { n: percent(of.accepted[i] / of.drafted[i]) }, of.state[i]];
  }));
}

function stepRows() {
  const body = byId("step-rows");
  if (!body.closest("details").open) return;
  fillTable(body, chart.steps.slice(-LISTED).reverse().map((one) => [
    String(one.number), { n: number(one.predicted, 1) }, { n: number(one.bound, 1) }, { n: number(one.actual, 1) }, count(one.own),
    count(one.drafts), count(one.prefill), count(one.committed)]));
}

/** A tick for each session at its slack, a line for each class; left of the middle line: late. */
function slackStrip(context, width, height) {
  const of = lastSessions, at = [];
  of?.slack_ms.forEach((slack, i) => { if (slack !== null) at.push([of.class[i], slack]); });
  const speed = (name) => Number(name) || Infinity;
  const classes = [...new Set(at.map(([name]) => name))].sort((a, b) => speed(a) - speed(b)).slice(0, 5);
  const left = 62, limit = ceiling(Math.max(100, ...at.map(([, slack]) => Math.abs(slack))));
  const x = (slack) => left + ((slack + limit) / (2 * limit)) * (width - left - 1), bottom = height - 18;
  context.strokeStyle = color("line");
  context.fillStyle = color("muted");
  context.textBaseline = "alphabetic";
  for (const [value, align] of [[-limit, "left"], [0, "center"], [limit, "right"]]) {
    context.beginPath();
    context.moveTo(Math.round(x(value)) + 0.5, 4);
    context.lineTo(Math.round(x(value)) + 0.5, bottom);
    context.stroke();
    context.textAlign = align;
    context.fillText(value < 0 ? `${number(-value, 0)} ms late` : value ? `${number(value, 0)} ms early` : "due now", x(value), height - 4);
  }
  const step = (bottom - 8) / Math.max(1, classes.length);
  classes.forEach((name, line) => {
    const y = 6 + line * step;
    context.fillStyle = color("muted");
    context.textAlign = "right";
    context.fillText(`${name}/s`, left - 8, y + step / 2 + 4);
    for (const [own, slack] of at) {
      if (own !== name) continue;
      context.fillStyle = color(slack < 0 ? "red" : "s-verify");
      context.globalAlpha = 0.7;
      context.fillRect(x(slack) - 1, y + 2, 2, Math.min(20, step - 4));
    }
    context.globalAlpha = 1;
  });
  const late = at.filter(([, slack]) => slack < 0).length;
  byId("slack").setAttribute("aria-label", `Slack of ${at.length} sessions with an SLO; ${late} are late`);
}

// --- one step, and its permalink ---

function showStep(step) {
  byId("step").hidden = !step;
  if (!step) return;
  setText("step-title", `Step ${number(step.number, 0)}`);
  const facts = [["predicted", ms(step.predicted)], ["bound", ms(step.bound)], ["measured", ms(step.actual)], ["own tokens", number(step.own, 0)],
    ["drafts", number(step.drafts, 0)], ["prompt tokens", number(step.prefill, 0)], ["committed", number(step.committed, 0)]];
  if (step.reason) facts.push(["policy", step.reason]);
  if (step.row) facts.push(["plan row", step.row]);
  byId("step-facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  byId("step-link").href = `#run=${run}&step=${step.number}`;
}

async function openPermalink() {
  const wanted = new URLSearchParams(location.hash.slice(1)), named = wanted.get("step");
  if (named === null || !run) return;
  const response = await ask(`/steps/${Number(named)}`), found = await response.json();
  if (!response.ok || wanted.get("run") !== run) {
    byId("step").hidden = false;
    setText("step-title", `Step ${named} is not held any more.`);
    byId("step-facts").replaceChildren();
    byId("step-link").href = location.hash;
    return;
  }
  const own = found.items - found.prefill_items;
  showStep({ number: found.step, predicted: found.predicted_ms, bound: found.bound_ms, actual: found.actual_ms, own, prefill: found.prefill_tokens,
    drafts: found.new_tokens - found.prefill_tokens - own, committed: found.committed, reason: found.reason, row: found.row });
}

addEventListener("hashchange", openPermalink);
tick().then(openPermalink);
