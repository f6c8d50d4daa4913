"use strict";
// What the whole page shares, the state of the server, and its charts.

const $ = id => document.getElementById(id);
const KEPT = 120;  // points of each chart

function element(tag, properties = {}, ...children) {  // texts among the children are text, never markup
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- requests ----------------------------------------------------------------------------------------------------------

const headers = () => ({"Content-Type": "application/json", ...($("key").value ? {Authorization: `Bearer ${$("key").value}`} : {})});

async function refusal(response) {  // what the server says, or else a proxy's status
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status} ${response.statusText}`;
  }
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const found = (rest + part.value).split("\n");
    rest = found.pop();
    yield* found;
  }
}

async function post(path, body, signal) {  // throws an Error with the server's message
  const request = {method: "POST", headers: headers(), body: JSON.stringify(body), signal};
  const response = await fetch(path, request).catch(error => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  });
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

async function* chunks(path, body, signal) {  // of a streamed answer
  for await (const line of lines(await post(path, body, signal))) {
    if (line === "data: [DONE]") return;
    if (!line.startsWith("data: {")) continue;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The answer broke off.");
}

// -- what /metrics says ------------------------------------------------------------------------------------------------

function parse(text) {  // {name: sum over all labels}, and by one label where a chart needs it: {"name|value": number}
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^(magicdec_\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    const label = /(?:part|of|state)="([^"]*)"/.exec(labels || "");
    const key = label ? `${name}|${label[1]}` : name;
    found[key] = (found[key] || 0) + Number(value);
  }
  return found;
}

const per = (above, below) => below > 0 ? above / below : NaN;
const CHARTS = [
  ["Tokens per second", [["generated", (d, s) => d("magicdec_generated_tokens_total") / s]]],
  ["Requests", [["running", (d, s, now) => now.magicdec_requests_running], ["waiting", (d, s, now) => now.magicdec_requests_waiting]]],
  ["Time to first token, ms", [["mean", d =>
    1e3 * per(d("magicdec_time_to_first_token_seconds_sum"), d("magicdec_time_to_first_token_seconds_count"))]]],
  ["Time per token, ms", [["mean", d =>
    1e3 * per(d("magicdec_inter_token_latency_seconds_sum"), d("magicdec_inter_token_latency_seconds_count"))]]],
  ["Speed-up over plain decoding", [
    ["measured", d => per(d("magicdec_decode_seconds_total|plain"), d("magicdec_decode_seconds_total|measured"))],
    ["predicted", d => per(d("magicdec_decode_seconds_total|plain"), d("magicdec_decode_seconds_total|predicted"))]]],
  ["Drafts accepted, %", [
    ["of those drafted", d => 100 * per(d("magicdec_accepted_tokens_total"), d("magicdec_draft_tokens_total"))],
    ["of those from text", d => 100 * per(d("magicdec_text_accepted_tokens_total"), d("magicdec_text_draft_tokens_total"))],
    ["of a draft model's", d => 100 * per(d("magicdec_model_accepted_tokens_total"), d("magicdec_model_draft_tokens_total"))]]],
  ["Drafted tokens per row (γ)", [["mean", d => per(d("magicdec_gamma_sum"), d("magicdec_gamma_count"))]]],
  ["KV pool, % of pages", ["owned", "cached"].map(state =>
    [state, (d, s, now) => 100 * per(now[`magicdec_pages|${state}`], now.magicdec_pages_total)])],
  ["Prompt tokens from the prefix cache, %", [
    ["recently", d => 100 * per(d("magicdec_prefix_hits_total"), d("magicdec_prefix_queries_total"))],
    ["in total", (d, s, now) => 100 * per(now.magicdec_prefix_hits_total, now.magicdec_prefix_queries_total)]]],
  ["Where time goes, % of it", ["draft", "verify", "host"].map(part =>
    [part, (d, s) => 100 * d(`magicdec_round_seconds_total|${part}`) / s])],
];

function draw() {
  for (const [title, lines] of CHARTS) {
    const card = document.createElement("section");
    card.className = "card";
    card.setAttribute("aria-label", title);
    card.innerHTML = `<h3></h3><div class="values"></div><svg viewBox="0 0 ${KEPT - 1} 100" preserveAspectRatio="none" aria-hidden="true"></svg>`;
    card.querySelector("h3").textContent = title;
    for (const [i, line] of lines.entries()) {
      const value = document.createElement("span"), name = document.createElement("small"), number = document.createElement("b");
      number.textContent = "–";
      name.textContent = line[0];
      value.className = `c${i}`;
      value.append(number, name);
      card.querySelector(".values").append(value);
      const curve = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      curve.setAttribute("class", `c${i}`);
      card.querySelector("svg").append(curve);
      Object.assign(line, {number, curve, points: []});
    }
    $("charts").append(card);
  }
}

function update(before, now, seconds) {
  const delta = key => Math.max(0, (now[key] || 0) - (before[key] || 0));
  for (const [, lines] of CHARTS) {
    for (const line of lines) {
      const value = line[1](delta, seconds, now);
      line.points.push(value);
      line.points.splice(0, line.points.length - KEPT);
      const last = [...line.points].reverse().find(Number.isFinite);
      line.number.textContent = last === undefined ? "–" : Number.isInteger(last) ? String(last) : last >= 100 ? last.toFixed(0) : last >= 10 ? last.toFixed(1) : last.toFixed(2);
    }
    const top = Math.max(1e-9, ...lines.flatMap(line => line.points.filter(Number.isFinite)));
    for (const line of lines) {
      const offset = KEPT - line.points.length;
      line.curve.setAttribute("points", line.points.map((y, x) => [x, y]).filter(([, y]) => Number.isFinite(y))
        .map(([x, y]) => `${x + offset},${(96 - 92 * y / top).toFixed(1)}`).join(" "));
    }
  }
}

function say(state, bad) {
  $("state").textContent = state;
  $("state").className = bad ? "bad" : "";
}

async function watch() {
  let before = null, at = 0;
  for (;;) {
    try {
      const ready = await fetch("/ready", {cache: "no-store"});
      const said = ready.ok ? null : (await ready.json()).error;
      say(ready.ok ? "ready" : said.message, !ready.ok);
      const now = parse(await (await fetch("/metrics", {cache: "no-store"})).text()), moment = performance.now() / 1e3;
      if (before) update(before, now, moment - at);
      [before, at] = [now, moment];
    } catch {
      say("no answer", true);
      before = null;  // counters begin anew with a new server
    }
    await new Promise(resume => setTimeout(resume, 1000));
  }
}

async function about() {
  const answer = await fetch("/v1/models", {headers: headers()});
  if (!answer.ok) return;
  const [model] = (await answer.json()).data;
  $("about").textContent = `${model.id}, up to ${model.max_model_len.toLocaleString("en")} tokens`;
}

draw();
watch();
about().catch(() => {});
$("key").addEventListener("change", () => about().catch(() => {}));
