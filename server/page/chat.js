"use strict";
// The chat in turns. Each request sends the whole conversation again; the server has most of it in its prefix cache.

const EXAMPLE = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Current weather of a place",
    parameters: {
      type: "object",
      properties: {place: {type: "string"}, unit: {enum: ["celsius", "fahrenheit"]}},
      required: ["place"],
    },
  },
}];
const messages = [];  // of the conversation, as the server takes them, but for the system prompt
let answering = null;  // aborts the answer that arrives
let waiting = null;  // the first field for results of calls, while the model waits for them

// -- the conversation as it is shown -----------------------------------------------------------------------------------

function addTurn(who, ...children) {
  const item = element("article", {className: who.toLowerCase()}, element("h3", {textContent: who}), ...children);
  $("turns").append(item);
  scrollToEnd();
  return item;
}

const isAtEnd = () => $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 40;
const scrollToEnd = () => { $("turns").scrollTop = $("turns").scrollHeight; };

function parsed(json) {  // undefined: it is not, or not yet, JSON
  try {
    return JSON.parse(json);
  } catch {
    return undefined;
  }
}

class Answer {  // one answer of the model: what has arrived of it, and its turn on the page
  constructor() {
    this.thinking = this.content = this.finish = "";
    this.calls = [];
    this.usage = null;
    this.began = performance.now();
    this.first = this.last = this.firstTokens = this.thinkingSince = 0;
    this.thoughts = element("details", {className: "thinking", open: true, hidden: true},
      element("summary", {textContent: "Thinking"}), element("div", {className: "text"}));
    this.text = element("div", {className: "text"});
    this.cards = element("form", {className: "calls", hidden: true});
    this.facts = element("p", {className: "soft facts"});
    this.item = addTurn("Model", this.thoughts, this.text, this.cards, this.facts);
  }

  add(chunk) {
    const follows = isAtEnd();  // a reader who has scrolled back stays there
    this.usage = chunk.usage || this.usage;
    const tokens = this.usage ? this.usage.completion_tokens : 0;
    if (tokens && chunk.choices.length) {
      this.last = performance.now();
      if (!this.first) [this.first, this.firstTokens] = [this.last, tokens];
    }
    for (const {delta, finish_reason} of chunk.choices) {
      this.finish = finish_reason || this.finish;
      if (delta.reasoning_content) this.think(delta.reasoning_content);
      if (delta.content || delta.tool_calls || finish_reason) this.endThinking();
      if (delta.content) this.text.append(delta.content);
      this.content += delta.content || "";
      for (const part of delta.tool_calls || []) this.addCall(part);
    }
    this.facts.textContent = this.say();
    if (follows) scrollToEnd();
  }

  think(more) {
    this.thinking += more;
    this.thinkingSince = this.thinkingSince || performance.now();
    this.thoughts.hidden = false;
    this.thoughts.lastChild.append(more);
  }

  endThinking() {
    if (!this.thinkingSince) return;
    this.thoughts.open = false;
    this.thoughts.firstChild.textContent = `Thought for ${((performance.now() - this.thinkingSince) / 1e3).toFixed(1)} s`;
    this.thinkingSince = 0;
  }

  addCall(part) {  // of a call: the first part has its name, and all of them parts of its arguments
    let call = this.calls[part.index];
    if (!call) {
      const name = part.function.name;
      call = this.calls[part.index] = {id: part.id, name, arguments: "", shown: element("pre")};
      call.card = element("section", {className: "call"}, element("h4", {textContent: name}), call.shown);
      call.card.setAttribute("aria-label", `Call of ${name}`);
      this.cards.hidden = false;
      this.cards.append(call.card);
    }
    call.arguments += part.function.arguments || "";
    const value = parsed(call.arguments);
    call.shown.textContent = value === undefined ? call.arguments : JSON.stringify(value, null, 2);
  }

  complete() {  // leave out calls that the answer did not finish
    this.endThinking();
    for (const call of this.calls.filter(call => parsed(call.arguments) === undefined)) {
      call.card.append(element("p", {className: "soft", textContent: "The call is incomplete, and no part of the conversation."}));
    }
    this.calls = this.calls.filter(call => parsed(call.arguments) !== undefined);
    return Boolean(this.content || this.calls.length || this.finish);
  }

  get message() {
    const calls = this.calls.map(({id, name, arguments: text}) => ({id, type: "function", function: {name, arguments: text}}));
    return {
      role: "assistant",
      content: this.content || (calls.length ? null : ""),
      ...(this.thinking ? {reasoning_content: this.thinking} : {}),
      ...(calls.length ? {tool_calls: calls} : {}),
    };
  }

  say() {  // the line of facts
    if (!this.first) return "";
    const {prompt_tokens: prompt, completion_tokens: tokens, ...details} = this.usage;
    const {accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected} = details.completion_tokens_details;
    const cached = details.prompt_tokens_details.cached_tokens, seconds = (this.last - this.first) / 1e3;
    return [
      `${tokens} ${tokens === 1 ? "token" : "tokens"}, the first after ${((this.first - this.began) / 1e3).toFixed(2)} s`,
      ...(tokens > this.firstTokens && seconds > 0 ? [`${((tokens - this.firstTokens) / seconds).toFixed(0)} tokens/s`] : []),
      `cached ${cached} of ${prompt} prompt tokens (${(100 * cached / prompt).toFixed(0)} %)`,
      `${accepted + rejected} drafted, ${accepted} accepted`,
      ...(this.finish === "length" ? ["cut off at the limit of tokens"] : []),
    ].join(" · ");
  }
}

// -- requests ----------------------------------------------------------------------------------------------------------

function readTools() {  // functions may stand alone or as tools. Throws an Error: it is no list of them
  const given = $("tools").value.trim();
  if (!given) return [];
  const list = parsed(given);
  if (!Array.isArray(list)) throw new Error("Tools: expected a JSON list of functions.");
  return list.map(each => each && each.name && !each.type ? {type: "function", function: each} : each);
}

function requestBody() {  // throws an Error: the tools are no list
  const system = $("system").value, tools = readTools();
  const number = (name, id) => $(id).value === "" ? {} : {[name]: Number($(id).value)};
  return {
    messages: [...(system.trim() ? [{role: "system", content: system}] : []), ...messages],
    ...(tools.length ? {tools, tool_choice: $("tool-choice").value} : {}),
    ...number("max_completion_tokens", "chat-tokens"), ...number("temperature", "chat-temperature"), ...number("seed", "chat-seed"),
    stream: true, stream_options: {include_usage: true, continuous_usage_stats: true},
  };
}

async function answer(added, undo) {  // let the model answer these messages; if nothing comes of it, they are taken back
  const mine = answering = new AbortController();
  let reply = null, failure = "";
  messages.push(...added);
  showState("Answering");
  try {
    const body = requestBody();
    reply = new Answer();
    for await (const chunk of chunks("/v1/chat/completions", body, mine.signal)) reply.add(chunk);
  } catch (error) {
    failure = mine.signal.aborted ? "" : error.message;
  }
  if (mine !== answering) return;  // a new chat has begun
  answering = null;
  const kept = reply !== null && reply.complete(), asks = kept && reply.calls.length > 0;
  showState(asks ? "The model waits for results." : mine.signal.aborted ? "Stopped." : failure ? "" : "Answered.", failure);
  if (kept) {
    messages.push(reply.message);
  } else {
    messages.length -= added.length;
    if (reply) reply.item.remove();
    undo();
  }
  if (asks) askResults(reply);
}

function showState(state, failure = "") {
  const stopping = document.activeElement === $("chat-stop");
  $("chat-state").textContent = state;
  $("chat-error").textContent = failure;
  $("send").disabled = Boolean(answering);
  $("chat-stop").disabled = !answering;
  $("turns").setAttribute("aria-busy", Boolean(answering));  // screen readers wait for the whole answer
  if (stopping && !answering) $("message").focus();
}

// -- what the user says ------------------------------------------------------------------------------------------------

function askResults(reply) {  // a field in the card of each call
  const fields = reply.calls.map(call => {
    const field = element("textarea", {className: "code", rows: 2, required: true, spellcheck: false});
    call.card.append(element("label", {className: "soft"}, `Result of ${call.name}`, field));
    sendOnEnter(field);
    return field;
  });
  const send = element("button", {className: "main", textContent: "Send results"});
  const wait = is => {
    waiting = is ? fields[0] : null;
    send.hidden = !is;
    for (const field of fields) field.readOnly = !is;
  };
  reply.cards.append(send);
  reply.cards.addEventListener("submit", event => {
    event.preventDefault();
    if (answering) return;
    const results = reply.calls.map((call, i) => ({role: "tool", tool_call_id: call.id, content: fields[i].value}));
    wait(false);
    $("message").focus();
    answer(results, () => wait(true));
  });
  wait(true);
  scrollToEnd();
  if (document.activeElement === $("message") && !$("message").value) fields[0].focus();
}

function sendMessage() {
  const field = $("message"), content = field.value;
  if (answering || !content.trim()) return;
  if (waiting) {
    showState("First send the results of the calls, or begin a new chat.");
    waiting.focus();
    return;
  }
  const item = addTurn("You", element("div", {className: "text", textContent: content}));
  field.value = "";
  answer([{role: "user", content}], () => {
    item.remove();
    field.value = field.value || content;
  });
}

function newChat() {
  const stopped = answering;
  answering = waiting = null;
  if (stopped) stopped.abort();
  messages.length = 0;
  $("turns").replaceChildren();
  showState("");
  $("message").focus();
}

function sendOnEnter(field) {  // but not while a word is composed, as in Japanese
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;  // 229: Safari's word
    event.preventDefault();
    field.form.requestSubmit();
  });
}

sendOnEnter($("message"));
$("chat").addEventListener("submit", event => { event.preventDefault(); sendMessage(); });
$("chat-stop").addEventListener("click", () => answering && answering.abort());
$("new-chat").addEventListener("click", newChat);
$("example").addEventListener("click", () => { $("tools").value = JSON.stringify(EXAMPLE, null, 2); });
