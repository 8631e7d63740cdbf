// Turns a fragmented MP4 into a plain one: many players find no duration in fragments, and cannot seek in them.
// The boxes are those of ISO 14496-12; the fragments are as the server makes them (`mp4_boxes.py`): one track, frames in order.

const NOT_A_KEY_FRAME = 0x00010000; // sample_is_non_sync_sample

export class Mp4File {
  #header = null; // the moov of the initialisation segment, which describes the track and has no frames
  #durations = []; // of each frame, in the track's timescale
  #sizes = []; // of each frame, in bytes
  #keyFrames = []; // numbers of frames, from 1
  #data = []; // Blobs rather than buffers: the browser may keep those on disk

  get numFrames() {
    return this.#sizes.length;
  }

  /** @param segment an ArrayBuffer: the initialisation segment, which comes first, or whole fragments. */
  append(segment) {
    for (const { type, body } of boxes(new DataView(segment))) {
      if (type === "moov") this.#header = body;
      else if (type === "moof") this.#addFrames(find(body, "traf", "trun"));
      else if (type === "mdat") this.#data.push(new Blob([body]));
    }
  }

  /** The frames so far as a Blob: a file whose index says how long each of them, and all of them, last. */
  blob() {
    const fileType = box("ftyp", "isom", uint32([0x200]), "isomiso2avc1mp41");
    const data = box("mdat", ...this.#data);
    const dataAt = fileType.size + this.#moov(0).size + 8; // the size of moov does not depend on this number
    return new Blob([fileType, this.#moov(dataAt), data], { type: "video/mp4" });
  }

  #addFrames(run) {
    const count = run.getUint32(4);
    for (let at = 12; at < 12 + 12 * count; at += 12) { // after flags, count and offset: duration, size and flags of each
      this.#durations.push(run.getUint32(at));
      this.#sizes.push(run.getUint32(at + 4));
      if (!(run.getUint32(at + 8) & NOT_A_KEY_FRAME)) this.#keyFrames.push(this.#sizes.length);
    }
  }

  #moov(dataAt) {
    const duration = this.#durations.reduce((sum, one) => sum + one, 0);
    const timescale = (header) => header.getUint32(12);
    const seconds = duration / timescale(find(this.#header, "trak", "mdia", "mdhd"));
    const inMovie = Math.round(seconds * timescale(find(this.#header, "mvhd")));
    const stbl = {
      stts: () => table("stts", runLengths(this.#durations)),
      stsc: () => table("stsc", [[1, this.numFrames, 1]]), // from chunk 1 on, all frames, described by entry 1
      stsz: () => box("stsz", uint32([0, 0, this.numFrames, ...this.#sizes])),
      stco: () => new Blob([table("stco", [[dataAt]]), table("stss", this.#keyFrames.map((number) => [number]))]),
    };
    const mdia = { mdhd: withUint32(16, duration), minf: { stbl } };
    const edits = { mvhd: withUint32(16, inMovie), trak: { tkhd: withUint32(20, inMovie), mdia }, mvex: () => "" };
    return box("moov", ...edited(this.#header, edits));
  }
}

/** The boxes that lie side by side in a DataView, each with its `type`, and as DataViews its `body` and the `whole` of it. */
function boxes(view) {
  const found = [];
  for (let at = 0; at < view.byteLength; at += view.getUint32(at)) {
    const part = (from) => new DataView(view.buffer, view.byteOffset + at + from, view.getUint32(at) - from);
    const type = String.fromCharCode(...[4, 5, 6, 7].map((place) => view.getUint8(at + place)));
    found.push({ type, body: part(8), whole: part(0) });
  }
  return found;
}

/** The body of a box inside other boxes. */
function find(view, ...path) {
  return path.reduce((inside, name) => boxes(inside).find(({ type }) => type === name).body, view);
}

/** The boxes in `view`, some of them replaced: an edit makes another box of a body, or has edits for the boxes inside. */
function edited(view, edits) {
  return boxes(view).map(({ type, body, whole }) => {
    const edit = edits[type];
    if (!edit) return whole;
    return typeof edit === "function" ? edit(body, type) : box(type, ...edited(body, edit));
  });
}

const withUint32 = (at, number) => (body, type) => {
  const copy = new DataView(body.buffer.slice(body.byteOffset, body.byteOffset + body.byteLength));
  copy.setUint32(at, number);
  return box(type, copy);
};

function box(type, ...parts) {
  const body = new Blob(parts);
  return new Blob([uint32([8 + body.size]), type, body]);
}

/** A box with a version, flags, and a counted table. */
const table = (type, rows) => box(type, uint32([0, rows.length, ...rows.flat()]));

function runLengths(numbers) {
  const runs = [];
  for (const number of numbers) {
    if (runs.at(-1)?.[1] === number) runs.at(-1)[0] += 1;
    else runs.push([1, number]);
  }
  return runs;
}

function uint32(numbers) {
  const view = new DataView(new ArrayBuffer(4 * numbers.length));
  numbers.forEach((number, place) => view.setUint32(4 * place, number));
  return view;
}
