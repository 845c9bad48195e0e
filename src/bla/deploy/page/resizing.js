"use strict";
// Pillow's resizing of 8-bit pixels: coefficients of 22 bits, first along the rows, then along the columns. Equal to the bit, except that
// Pillow 13 rounds in the other order where the height shrinks far more than the width.
const resizing = (() => {
  const sinc = x => x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1;
  const filters = {  // how far a filter reaches, and its value at a distance from 0 to that
    bilinear: [1, x => 1 - x],
    bicubic: [2, x => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-.5 * x + 2.5) * x - 4) * x + 2],
    lanczos: [3, x => sinc(x) * sinc(x / 3)],
  };
  const clipped = (sum, most) => sum < 0 ? 0 : sum > most ? most : sum;

  // For each pixel from start to stop of a side that is resized from `from` to `to` pixels: the first one that it reads, and weights.
  function weights(from, to, [start, stop], kind) {
    const scale = from / to;
    return Array.from({ length: stop - start }, (_, i) => {
      const middle = (start + i + .5) * scale;
      if (kind === "nearest") return [Math.floor(middle), [2 ** 22]];
      const [reach, value] = filters[kind], wide = Math.max(1, scale);
      const first = Math.max(0, Math.trunc(middle - reach * wide + .5)), last = Math.min(from, Math.trunc(middle + reach * wide + .5));
      const found = Array.from({ length: last - first }, (_, k) => { const x = Math.abs((k + first - middle + .5) * (1 / wide)); return x < reach ? value(x) : 0; });
      const sum = found.reduce((a, b) => a + b, 0);
      return [first, found.map(w => Math.trunc(w / sum * 2 ** 22 + (w < 0 ? -.5 : .5)))];
    });
  }

  // RGB pixels (rows, columns, 3) of a part [[left, right], [top, bottom]] of a photo, resized to `whole` = [width, height].
  // strip(top, bottom) gives rows of the photo's RGBA pixels, so that a large photo is never held as a whole.
  function resized([width, height], strip, whole, [across, down], kind) {
    const columns = weights(width, whole[0], across, kind), rows = weights(height, whole[1], down, kind);
    const first = rows[0][0], last = Math.max(...rows.map(([top, w]) => top + w.length)), line = 3 * columns.length;
    const narrow = new Uint8Array((last - first) * line), found = new Uint8Array(rows.length * line), step = Math.max(1, Math.floor(2 ** 20 / width));
    for (let top = first; top < last; top += step) {
      const bottom = Math.min(last, top + step), pixels = strip(top, bottom);
      for (let y = top; y < bottom; y++) columns.forEach(([left, w], x) => {
        for (let c = 0; c < 3; c++) {
          let sum = 2 ** 21;
          for (let k = 0, at = 4 * ((y - top) * width + left) + c; k < w.length; k++, at += 4) sum += w[k] * pixels[at];
          narrow[(y - first) * line + 3 * x + c] = clipped(Math.floor(sum / 2 ** 22), 255);
        }
      });
    }
    rows.forEach(([top, w], y) => {
      for (let x = 0; x < line; x++) {
        let sum = 2 ** 21;
        for (let k = 0, at = (top - first) * line + x; k < w.length; k++, at += line) sum += w[k] * narrow[at];
        found[y * line + x] = clipped(Math.floor(sum / 2 ** 22), 255);
      }
    });
    return found;
  }

  const even = x => { const low = Math.floor(x); return x - low === .5 ? low + low % 2 : Math.round(x); };  // as Python rounds

  // What a classifier sees of a photo of [width, height]: the size of the whole photo once resized, and the part that it takes of it.
  function framed({ size: [height, width], mode, crop_fraction: share }, photo) {
    const sides = [width, height], larger = sides.map(side => Math.floor(side / share));
    let whole = mode === "squash" ? sides : larger;
    if (mode === "crop") {
      const ratio = Math.min(photo[0] / larger[0], photo[1] / larger[1]), short = Math.min(...photo);
      whole = photo.map(side => larger[0] === larger[1] ? Math.floor(larger[0] * side / short) : even(side / ratio));
    }
    const part = sides.map((side, i) => { const start = even((whole[i] - side) / 2); return [start, start + side]; });
    const [left, right, top, bottom] = part.flatMap((ends, i) => ends.map(end => end * photo[i] / whole[i]));
    return { whole, part, region: [left, top, right, bottom] };
  }

  return { resized, framed };
})();
