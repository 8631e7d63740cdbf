// One WebSocket to the server, opened again with growing pauses when it is lost. It carries messages and judges none of them.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;
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
   * @param handlers {message(object), media(ArrayBuffer), lost({code, reason, retryInMs}), silent(), trying()};
   * `retryInMs` is null where only a (new) token is worth another try.
   */
  constructor(handlers) {
    this.#handlers = handlers;
    addEventListener("online", () => this.#timer && this.open());
  }

  /** Connects anew; with a token, sends it first. */
  open(token = this.#token) {
    this.#token = token;
    this.close();
    this.#handlers.trying();
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/v1/realtime`);
    this.#socket = socket;
    this.#ready = false;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
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
      const tokenWanted = code === 4401 || (code === 4408 && !this.#ready); // refused, or waited for in vain
      const retryInMs = tokenWanted ? null : this.#nextPause();
      if (retryInMs !== null) this.#timer = setTimeout(() => this.open(), retryInMs);
      this.#handlers.lost({ code, reason, retryInMs });
    };
  }

  /** Whether the message went out. */
  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  /** If the connection is lost now, it is not opened again within this time. */
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
