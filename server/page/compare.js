"use strict";
// One prompt with speculation and without: the same text, which of its tokens were drafted, and how long each took.

let comparing = null;  // aborts the answer that arrives

function show(out, text, marks) {  // a span per token; only what is new is added
  for (let i = Math.max(0, out.childElementCount - 1); i < marks.length; i++) {
    const span = out.children[i] || out.appendChild(element("span"));
    span.className = marks[i].origin;
    span.textContent = text.slice(marks[i].at, i + 1 < marks.length ? marks[i + 1].at : undefined);
  }
  out.scrollTop = out.scrollHeight;
}

async function readPrompt() {  // of a chat its tokens: a completion of them is the whole answer, with its thinking
  const prompt = $("prompt").value;
  if ($("kind").value === "completion") return prompt;
  const response = await post("/tokenize", {messages: [{role: "user", content: prompt}]}, comparing.signal);
  return (await response.json()).tokens;
}

async function run(side, enabled, prompt) {
  const out = $(`out-${side}`), facts = $(`facts-${side}`);
  out.replaceChildren();
  facts.textContent = "waiting";
  const body = {
    prompt, max_tokens: Number($("tokens").value), temperature: Number($("temperature").value), seed: Number($("seed").value),
    stream: true, stream_options: {include_usage: true}, speculation: {enabled, report: true},
  };
  const began = performance.now(), marks = [];
  let text = "", first = 0, last = 0, usage = null;
  for await (const chunk of chunks("/v1/completions", body, comparing.signal)) {
    usage = chunk.usage || usage;
    for (const choice of chunk.choices) {
      text += choice.text;
      const told = choice.speculation || {origins: [], offsets: []};
      told.origins.forEach((origin, i) => marks.push({origin, at: told.offsets[i]}));
      if (told.origins.length) { last = performance.now(); first = first || last; }
      show(out, text, marks);
    }
    const rate = marks.length > 1 && last > first ? `, ${((marks.length - 1) / (last - first) * 1e3).toFixed(0)} tokens/s` : "";
    facts.textContent = `${marks.length} tokens in ${((last - began) / 1e3).toFixed(2)} s, the first after ${((first - began) / 1e3).toFixed(2)} s${rate}`;
  }
  const details = usage && usage.completion_tokens_details;
  if (enabled && details) facts.textContent += `, ${details.accepted_prediction_tokens} were drafted`;
  return {text, decode: marks.length > 1 ? (last - first) / (marks.length - 1) : NaN};
}

async function play(sides) {
  comparing = new AbortController();
  for (const id of ["both", "one"]) $(id).disabled = true;
  $("stop").disabled = false;
  $("verdict").textContent = "";
  $("verdict").className = "";
  if (sides.length === 1) { $("out-off").replaceChildren(); $("facts-off").textContent = "\u00a0"; }
  try {
    const done = [], prompt = await readPrompt();
    for (const [side, enabled] of sides) done.push(await run(side, enabled, prompt));
    if (done.length === 2) {
      const same = done[0].text === done[1].text, gain = done[1].decode / done[0].decode;
      $("verdict").textContent = (same ? "The same text" : "The texts differ") +
        (Number.isFinite(gain) ? `; ${gain.toFixed(2)} × as fast per token with speculation.` : ".");
      $("verdict").className = same ? "" : "bad";
    }
  } catch (error) {
    $("verdict").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    $("verdict").className = error.name === "AbortError" ? "" : "bad";
  }
  for (const id of ["both", "one"]) $(id).disabled = false;
  $("stop").disabled = true;
}

$("form").addEventListener("submit", event => { event.preventDefault(); play([["on", true], ["off", false]]); });
$("one").addEventListener("click", () => play([["on", true]]));
$("stop").addEventListener("click", () => comparing && comparing.abort());
$("long").addEventListener("click", () => { $("prompt").value = $("sample").content.textContent; });
