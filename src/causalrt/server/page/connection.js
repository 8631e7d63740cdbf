// One WebSocket to the server, reopened with growing pauses when it is lost. It passes messages on without interpreting them.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;
const ANSWER_WITHIN_MS = 3_000;
const READY_WITHIN_MS = 1_500; // a server that wants a token says nothing until it has one

export class Connection {
  #handlers;
  #socket = null;
  #token = "";
  #timer = 0;
  #silence = 0;
  #attempts = 0;
  #notWithinMs = 0;
  #ready = false;

  /**
   * @param handlers {message(object), media(ArrayBuffer), lost({code, reason, opened, retryInMs}), silent(), trying()};
   * `opened` says whether the server had accepted the connection, `retryInMs` is null where only a (new) token is worth another try.
   */
  constructor(handlers) {
    this.#handlers = handlers;
    addEventListener("online", () => this.#timer && this.open());
  }

  /** Reconnects; sends the token first, if there is one. */
  open(token = this.#token) {
    this.#token = token;
    this.close();
    this.#handlers.trying();
    // From the page's own address on: a proxy may have put the server behind a path.
    const socket = new WebSocket(new URL("v1/realtime", document.baseURI).href.replace(/^http/, "ws"));
    this.#socket = socket;
    this.#ready = false;
    let opened = false;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      opened = true;
      if (token) this.send({ type: "auth", token });
      this.#silence = setTimeout(() => this.#handlers.silent(), READY_WITHIN_MS);
    };
    socket.onmessage = ({ data }) => {
      clearTimeout(this.#silence);
      if (typeof data !== "string") return this.#handlers.media(data);
      const message = JSON.parse(data);
      if (message.type === "ready") {
        this.#ready = true;
        this.#attempts = this.#notWithinMs = 0;
      }
      this.#handlers.message(message);
    };
    socket.onclose = ({ code, reason }) => {
      clearTimeout(this.#silence);
      this.#socket = null;
      const tokenWanted = code === 4401 || (code === 4408 && !this.#ready); // refused, or not sent in time
      const retryInMs = tokenWanted ? null : this.#nextPause();
      if (retryInMs !== null) this.#timer = setTimeout(() => this.open(), retryInMs);
      this.#handlers.lost({ code, reason, opened, retryInMs });
    };
  }

  /** Sends a message; returns whether it was sent. */
  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  /** Sets the least time before a lost connection is reopened. */
  notWithin(ms) {
    this.#notWithinMs = ms;
  }

  close() {
    clearTimeout(this.#timer);
    clearTimeout(this.#silence);
    this.#timer = 0;
    if (!this.#socket) return;
    this.#socket.onclose = this.#socket.onmessage = this.#socket.onopen = null;
    this.#socket.close();
    this.#socket = null;
  }

  #nextPause() {
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** this.#attempts++, LONGEST_PAUSE_MS);
    // Spread out: many pages may have lost the same server.
    return Math.max(pause * (0.75 + 0.5 * Math.random()), this.#notWithinMs);
  }
}

/**
 * Why the server did not accept the connection, in words for the user. The browser does not say so to the page, but the server
 * refuses other requests that carry the page's `Origin` for the same reason.
 */
export async function whyNotAccepted() {
  try {
    const request = { method: "POST", signal: AbortSignal.timeout(ANSWER_WITHIN_MS) }; // readyz answers GET alone, so nothing is done
    const response = await fetch(new URL("readyz", document.baseURI), request);
    const code = (await response.json()).error?.code;
    if (code === "wrong_origin") {
      return `The server refuses pages from ${location.origin}, because a proxy calls it by another name. ` +
        `Start the server with --allow-origin ${location.origin}, or let the proxy pass the header Host on unchanged.`;
    }
    if (code) return "The server answers, but WebSockets do not get through to it. A proxy has to pass on the headers Upgrade and Connection.";
  } catch {} // no answer, or not the server's
  return "The server cannot be reached.";
}
