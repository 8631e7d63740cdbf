// Plays fragmented MP4 as it arrives (Media Source Extensions), close behind what is generated, and keeps it for download.

import { Mp4File } from "./mp4.js";

const KEEP_S = 30; // behind the playhead, when the browser's buffer is full
const KEPT_BYTES = 1 << 30; // of a generation, for download
const LOW_S = 0.5; // with less ahead than this, playback is slowed down rather than stopped
const SLOWEST = 0.75;

const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource; // iPhones have only the second

/** Why this browser cannot play `mime` (in words for the user), or null if it can. */
export function whyUnplayable(mime) {
  if (!Source) return "This browser has no Media Source Extensions. A current Chrome, Edge, Firefox or Safari has them.";
  if (!Source.isTypeSupported(mime)) return `This browser cannot play ${mime}. One with H.264 can: Chrome, Edge, Firefox or Safari.`;
  return null;
}

export class Player {
  #video;
  #failed;
  #source = null;
  #buffer = null;
  #waiting = []; // fragments that are not yet appended
  #kept = new Mp4File();
  #keptBytes = 0;
  #complete = true;
  #ended = true;

  /** @param failed is called with the reason, for the user, if the video cannot be played. */
  constructor(video, failed) {
    this.#video = video;
    this.#failed = failed;
    video.disableRemotePlayback = true; // ManagedMediaSource opens only then
    video.addEventListener("error", () => this.#source && failed(`The video cannot be decoded: ${video.error.message}`));
    video.addEventListener("timeupdate", () => this.#pump());
  }

  /** Begins a new video; `firstFrame` is called when its first frame is on the screen. */
  open(mime, firstFrame) {
    const video = this.#video;
    const source = new Source();
    URL.revokeObjectURL(video.src);
    [this.#source, this.#buffer, this.#ended, this.#complete] = [source, null, false, true];
    [this.#waiting, this.#kept, this.#keptBytes] = [[], new Mp4File(), 0];
    source.addEventListener("sourceopen", () => {
      this.#buffer = source.addSourceBuffer(mime);
      this.#buffer.addEventListener("updateend", () => this.#pump());
      this.#pump();
    }, { once: true });
    video.controls = false;
    video.playbackRate = 1;
    video.src = URL.createObjectURL(source);
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(firstFrame);
    else video.addEventListener("loadeddata", firstFrame, { once: true });
    this.play();
  }

  append(fragment) {
    if (this.#ended) return;
    this.#waiting.push(fragment);
    if (this.#keptBytes + fragment.byteLength > KEPT_BYTES) this.#complete = false;
    if (this.#complete) {
      this.#kept.append(fragment);
      this.#keptBytes += fragment.byteLength;
    }
    this.#pump();
  }

  /** Ends the stream: the video plays to its end, and can then be replayed. */
  end() {
    if (this.#ended) return;
    this.#ended = true;
    this.#video.playbackRate = 1;
    this.#video.controls = this.hasFile;
    this.#pump();
  }

  play() {
    this.#video.play().catch((error) => {
      if (error.name === "NotAllowedError") this.#video.controls = true; // the user has to press play
    });
  }

  pause() {
    this.#video.pause();
  }

  get playedS() {
    return this.#video.currentTime;
  }

  /** Whether there is something to download. */
  get hasFile() {
    return this.#kept.numFrames > 0;
  }

  /** The video so far as a plain MP4: {blob, complete}; call it only if `hasFile`. */
  file() {
    return { blob: this.#kept.blob(), complete: this.#complete };
  }

  /** Keeps playback just behind the live edge: called a few times a second with generated / real time. */
  follow(speed) {
    const { buffered, currentTime, seeking } = this.#video;
    if (this.#ended || seeking || !buffered.length) return;
    // A hole (frames that the browser dropped from its buffer) would stop playback for good.
    for (let i = 0; i < buffered.length; i++) {
      if (currentTime < buffered.start(i) - 0.001) {
        this.#video.currentTime = buffered.start(i);
        return;
      }
      if (currentTime <= buffered.end(i)) break;
    }
    const bufferedS = buffered.end(buffered.length - 1) - currentTime;
    this.#video.playbackRate = bufferedS < LOW_S ? Math.min(1, Math.max(SLOWEST, speed)) : 1;
  }

  #pump() {
    const buffer = this.#buffer;
    if (!buffer || buffer.updating || this.#source.readyState !== "open") return;
    if (this.#waiting.length === 0) {
      if (this.#ended) this.#source.endOfStream();
      return;
    }
    try {
      buffer.appendBuffer(this.#waiting[0]);
      this.#waiting.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") return this.#failed(`The video cannot be played: ${error.message}`);
      // Full: drop what was played long ago, or wait for playback to go on (timeupdate comes back here).
      const until = this.#video.currentTime - KEEP_S;
      if (buffer.buffered.length && until > buffer.buffered.start(0)) buffer.remove(0, until);
    }
  }
}
