// The page: one prompt box, one video, one connection. `state` below holds everything; `render` shows it.

import { Connection, whyNotAccepted } from "./connection.js";
import { LatencyView, ms } from "./latency.js";
import { Player, whyUnplayable } from "./player.js";

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const HOLD_S = 6; // of video that is not played yet: generation is held, or a switch would show late and memory fill
const GO_ON_S = 3;
const FIRST_CHUNK = "Generating the first chunk.";
const SMALL = 200; // pixels of a picture that is shown with its pixels, and not blurred
const RATE_OVER_CHUNKS = 6;
const BUSY_STATES = ["asking", "queued", "running", "stopping"];
const ENDINGS = {
  done: "Finished.",
  stopped: "Stopped.",
  draining: "The server is shutting down and ended the video here.",
  stalled: "The server ended the video here: it was paused or its tab was hidden for too long, or it was not received fast enough.",
};
const CLOSED = {
  1001: "The server is shutting down or restarting",
  1009: "The message was too big for the server",
  1011: "The server failed",
  1012: "The server is shutting down or restarting",
  4429: "The server has no place free now",
};
const HISTORY = { keep: "history kept", recache: "history recomputed", flush: "history dropped" };
const ADVICE = { // what to do about an error that the server reports, after its own words
  bad_request: "Change the prompt or the options and try again.",
  unauthorized: "Enter a valid access token.",
  too_large: "Make the prompt shorter.",
  internal: "Something failed on the server. Try again; if it happens again, its log says why.",
};

const state = {
  phase: "connecting", // connecting, idle, asking, queued, running, stopping
  paused: false, // by the user
  held: false, // by the page: enough video waits to be played
  server: null, // its "ready"
  chunks: 0,
  frames: 0, // received
  wanted: null,
  next: null, // the start request that waits until the stopped video has ended
  playable: true,
  cause: "", // why the last connection that had been ready ended, in words
  arrivals: [], // [time, frames] of recent chunks
  askedAt: 0,
};
const player = new Player($.video, (words) => {
  complain(words);
  if (isUsable($.stop)) $.stop.click(); // nobody would watch the rest
});
const latency = new LatencyView($);
const connection = new Connection({ message: receive, media: (data) => player.append(data), lost, silent, trying });

function say(words) {
  if ($.status.textContent !== words) $.status.textContent = words;
}

function complain(words, { retry = false } = {}) {
  if ($["alert-text"].textContent !== words) $["alert-text"].textContent = words;
  $.alert.hidden = !words;
  $.retry.hidden = !retry;
}

// A button that is out of use keeps the keyboard's place on the page; `disabled` would lose it.
const usable = (button, yes) => button.setAttribute("aria-disabled", String(!yes));
const isUsable = (button) => button.getAttribute("aria-disabled") === "false";

function render() {
  const busy = ["asking", "queued", "running"].includes(state.phase);
  const running = state.phase === "running";
  $.go.textContent = busy ? "Switch prompt" : "Start";
  usable($.go, running || (["idle", "stopping"].includes(state.phase) && state.playable));
  $.pause.textContent = state.paused ? "Resume" : "Pause";
  usable($.pause, running);
  usable($.stop, busy || state.next !== null);
  usable($.download, player.hasFile);
  $.policies.hidden = !busy;
  $.options.hidden = $["chunks-hint"].hidden = busy;
  $["prompt-hint"].textContent = busy ? "Enter switches to this prompt while the video runs." : "Enter starts, Shift+Enter makes a new line.";
  $.stage.dataset.phase = state.paused ? "paused" : state.phase;
  const limit = state.server?.max_prompt_chars;
  $["prompt-count"].textContent = limit ? `${$.prompt.value.length} of ${limit}` : "";
}

function connectionState(name, words) {
  $.connection.dataset.state = name;
  $.connection.textContent = words;
}

function finish(words) {
  player.end();
  Object.assign(state, { phase: state.server ? "idle" : "connecting", paused: false, held: false });
  say(words);
  if (state.next && state.phase === "idle") begin(state.next);
  state.next = null;
  render();
}

function begin(request) {
  if (!connection.send({ type: "start", ...request })) return;
  state.phase = "asking";
  say("Asking for a video.");
}

// ---- messages from the server ----

function receive(message) {
  const handle = {
    ready, started, chunk, switched,
    queued: ({ position }) => { state.phase = "queued"; say(`Waiting for a free place: number ${position} in the queue.`); },
    paused: () => state.paused && say("Paused."), // when the page holds generation, the figures say so, without a word each time
    resumed: () => { state.arrivals = []; say("Generating."); },
    ended: ({ reason, chunks }) => finish(`${ENDINGS[reason] ?? "Ended."} ${chunks} ${chunks === 1 ? "chunk" : "chunks"}.`),
    error: failed,
  }[message.type];
  handle?.(message);
  render();
}

function ready(message) {
  state.server = message;
  state.phase = "idle";
  if ($["token-form"].contains(document.activeElement)) $.prompt.focus();
  $["token-form"].hidden = true;
  $.format.textContent = `${message.width} × ${message.height}, ${message.fps} frames a second`;
  $.stage.style.aspectRatio = `${message.width} / ${message.height}`;
  $.prompt.maxLength = message.max_prompt_chars;
  $.chunks.max = message.max_chunks ?? "";
  $["chunks-hint"].textContent = message.max_chunks ? `Chunks: at most ${message.max_chunks}; empty means as many.` : "Chunks: empty means until you stop it.";
  connectionState("ready", "Connected");
  $.about.textContent = message.about ?? "";
  $.about.hidden = !message.about;
  $.video.style.imageRendering = message.width < SMALL ? "pixelated" : "";
  offerExamples(message.examples ?? []);
  const why = whyUnplayable(message.mime);
  state.playable = why === null;
  state.cause = "";
  complain(why ?? "");
  say(state.chunks ? "Connected again. Start begins a new video." : "Ready.");
}

function offerExamples(prompts) {
  if (prompts.length) $.prompt.placeholder = prompts[0];
  $.examples.hidden = !prompts.length;
  $.examples.replaceChildren(...prompts.map((prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => {
      $.prompt.value = prompt;
      $.prompt.focus();
      render();
    });
    return button;
  }));
}

function warn(warnings) {
  $["prompt-warning"].textContent = warnings.map(({ message }) => sentence(message)).join(" ");
  $["prompt-warning"].hidden = !warnings.length;
}

function started({ chunks, warnings }) {
  warn(warnings);
  Object.assign(state, { phase: "running", chunks: 0, frames: 0, wanted: chunks, arrivals: [], paused: false, held: false });
  for (const tile of $.tiles.querySelectorAll("b, small")) tile.textContent = tile.tagName === "B" ? "–" : "";
  latency.clear(state.server.fps);
  player.open(state.server.mime, () => {
    $["first-frame"].textContent = ms(performance.now() - state.askedAt);
    $.empty.hidden = true;
  });
  say(FIRST_CHUNK);
}

function chunk(message) {
  const now = performance.now();
  state.chunks = message.index + 1;
  state.frames += message.frames;
  state.arrivals = [...state.arrivals, [now, message.frames]].slice(-RATE_OVER_CHUNKS);
  const tookMs = latency.add(message);
  const playsMs = (1000 * message.frames) / state.server.fps;
  if (message.index === 0) {
    if ($.status.textContent === FIRST_CHUNK) say("Generating."); // and not over a pause or a switch that came before it
    const cold = message.cold_ms ? `, ${ms(message.cold_ms)} with its start` : "";
    $["first-frame-note"].textContent = `server ${ms(message.first_frame_ms)}${cold}`;
  }
  $["latest-chunk"].textContent = ms(tookMs);
  $["latest-chunk-note"].textContent = `plays ${ms(playsMs)}`;
  $["chunk-count"].textContent = state.chunks;
  $["chunk-count-note"].textContent = state.wanted ? `of ${state.wanted}` : "";
  const perSecond = framesPerSecond();
  if (perSecond) {
    $.rate.textContent = perSecond.toFixed(1);
    $["rate-note"].textContent = `${(perSecond / state.server.fps).toFixed(2)} × real time`;
  }
  holdOrGoOn();
}

function switched({ ms: took, from_chunk, policy, warnings }) {
  warn(warnings);
  latency.markSwitch(from_chunk, policy);
  $["switch-time"].textContent = ms(took);
  $["switch-note"].textContent = `${HISTORY[policy]}, from chunk ${from_chunk}`;
  say(`New prompt from chunk ${from_chunk} on.`);
}

function failed({ code, message, retry_after_s }) {
  if (code === "bad_request" && ["idle", "stopping"].includes(state.phase)) return; // a pause or stop that crossed the end
  const later = retry_after_s ? `Try again in ${Math.ceil(retry_after_s)} s.` : "Try again in a moment.";
  complain(`${sentence(message)} ${ADVICE[code] ?? later}`);
  connection.notWithin(1000 * (retry_after_s ?? 0));
  if (code === "unauthorized") askForToken();
  // A refused switch leaves the video running; a refused start, or a failure, does not.
  if (["asking", "queued"].includes(state.phase)) finish("Not started.");
  else if (["internal", "not_ready"].includes(code) && BUSY_STATES.includes(state.phase)) finish("Ended by an error.");
  else if (state.phase === "running") say("Generating, with the prompt as it was.");
}

const sentence = (words) => (/[.!?]$/.test(words ?? "") ? words : `${words}.`);

// ---- the connection ----

function trying() {
  connectionState("connecting", "Connecting");
}

async function lost({ code, reason, opened, retryInMs }) {
  const wasBusy = BUSY_STATES.includes(state.phase);
  const wasReady = state.server !== null;
  state.server = null;
  state.phase = "connecting";
  connectionState("lost", "Not connected");
  if (retryInMs === null) {
    complain($.token.value ? "The server does not accept this token. Check it and try again." : "");
    askForToken();
    finish("The server asks for an access token.");
    return;
  }
  // Announced once; how long each try is waited for stands where it interrupts nobody.
  connectionState("lost", `Not connected, next try in ${Math.max(1, Math.round(retryInMs / 1000))} s`);
  finish("Not connected.");
  const closed = `${CLOSED[code] ?? "The connection was lost"}${reason ? ` (${reason})` : ""}.`;
  if (wasReady) state.cause = wasBusy ? `${closed} The video ends here; what arrived can be played and downloaded.` : closed;
  const words = state.cause || (opened ? closed : await whyNotAccepted());
  if (!state.server) complain(`${words} The page keeps trying to connect.`, { retry: true });
}

function silent() {
  askForToken();
  say("The server has not answered yet. It may want an access token.");
}

function askForToken() {
  $["token-form"].hidden = false;
  if (!$.prompt.value) $.token.focus(); // unless the user is typing
}

// ---- actions of the user ----

$["token-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $.token.value);
  complain("");
  connection.open($.token.value);
});

$["prompt-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  if (!isUsable($.go)) return;
  const prompt = $.prompt.value.trim();
  if (!prompt) return complain("Type a prompt first.");
  complain("");
  if (state.phase === "running") {
    const policy = new FormData($["prompt-form"]).get("policy");
    if (connection.send({ type: "switch", prompt, policy })) say("Switching the prompt.");
  } else {
    const request = { prompt, seed: Number($.seed.value), chunks: $.chunks.value ? Number($.chunks.value) : null };
    state.askedAt = performance.now();
    if (state.phase === "idle") begin(request);
    else {
      state.next = request;
      say("The new video begins after this chunk.");
    }
  }
  render();
});

$.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $["prompt-form"].requestSubmit();
});
$.prompt.addEventListener("input", render);

$.pause.addEventListener("click", () => {
  if (!isUsable($.pause)) return;
  state.paused = !state.paused;
  // While the page holds generation the server is paused already, and stays so until playback has caught up.
  if (state.held) say(state.paused ? "Paused." : "Generating.");
  else if (connection.send({ type: state.paused ? "pause" : "resume" })) say(state.paused ? "Pausing." : "Resuming.");
  if (state.paused) player.pause();
  else player.play();
  render();
});

$.stop.addEventListener("click", () => {
  if (!isUsable($.stop)) return;
  if (state.phase !== "stopping") connection.send({ type: "stop" });
  state.phase = "stopping";
  state.next = null;
  say("Stopping after this chunk.");
  if (state.paused) player.play();
  render();
});

$.download.addEventListener("click", () => {
  if (!isUsable($.download)) return;
  const { blob, complete } = player.file();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${$.prompt.value.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "video"}.mp4`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  if (!complete) complain("The video is longer than this page keeps: the file holds its first gigabyte.");
});

$.retry.addEventListener("click", () => {
  complain("");
  $.prompt.focus(); // this button disappears
  connection.open();
});

// ---- playback beside generation ----

function framesPerSecond() {
  if (state.arrivals.length < 2) return null;
  const [first] = state.arrivals[0];
  const [last] = state.arrivals.at(-1);
  const frames = state.arrivals.slice(1).reduce((sum, [, n]) => sum + n, 0);
  return (1000 * frames) / Math.max(1, last - first);
}

/** Seconds of video that were received and not yet played; a hidden page may play nothing, nor put anything into its buffer. */
const aheadS = () => Math.max(0, state.frames / state.server.fps - player.playedS);

// Called with every chunk, too: a browser calls timers of hidden pages rarely.
function holdOrGoOn() {
  if (state.paused || state.phase !== "running") return;
  if (!state.held && aheadS() > HOLD_S) state.held = connection.send({ type: "pause" });
  else if (state.held && aheadS() < GO_ON_S) state.held = !connection.send({ type: "resume" });
}

setInterval(() => {
  if (!["running", "stopping"].includes(state.phase)) return;
  player.follow((framesPerSecond() ?? state.server.fps) / state.server.fps);
  holdOrGoOn();
  $.ahead.textContent = `${aheadS().toFixed(1)} s`;
  $["ahead-note"].textContent = state.held ? "generation waits" : "not yet played";
}, 200);

// A browser may stop the video of a page that nobody sees; generation then waits, and goes on with it.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && state.phase === "running" && !state.paused) player.play();
});

$.token.value = sessionStorage.getItem("token") ?? "";
render();
connection.open($.token.value);
