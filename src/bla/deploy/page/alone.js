"use strict";
// The explainer itself, for a page without a server: answers what a server answers (src/bla/deploy/serve), from the graph in this file.
window.alone = (() => {
  const card = CARD;
  const { transform, grid, classes } = card, [height, width] = transform.size, cells = grid[0] * grid[1];
  const outputs = ["logits", "classifier_logits", "selected", "unbounded"];

  // A file that stands in the page as compressed text.
  async function embedded(id) {
    const text = atob($(id).textContent), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    $(id).remove();
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }
  const ready = new Promise(done => window.addEventListener("load", () => setTimeout(done))).then(async () => {
    const ort = await import(URL.createObjectURL(new Blob([await embedded("runtime")], { type: "text/javascript" })));
    ort.env.wasm.wasmBinary = await embedded("engine");
    ort.env.wasm.numThreads = 1;
    return { ort, graph: await ort.InferenceSession.create(await embedded("graph")) };
  });
  ready.catch(error => fail(`This browser cannot run the explainer: ${error.message}`));

  // A photo's pixels, normalised, (3, height, width), and the region of the photo that they cover.
  async function read(file) {
    const image = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
    const sides = [image.width, image.height], { whole, part, region } = resizing.framed(transform, sides);
    const strip = (top, bottom) => {
      const pen = new OffscreenCanvas(image.width, bottom - top).getContext("2d", { willReadFrequently: true });
      pen.fillStyle = "#fff"; pen.fillRect(0, 0, image.width, bottom - top);
      pen.drawImage(image, 0, -top);
      return pen.getImageData(0, 0, image.width, bottom - top).data;
    };
    const levels = resizing.resized(sides, strip, whole, part, transform.interpolation), area = width * height;
    const pixels = Float32Array.from({ length: 3 * area }, (_, i) => {
      const c = Math.floor(i / area);
      return (levels[3 * (i % area) + c] / 255 - transform.mean[c]) / transform.std[c];
    });
    return { file, pixels, region };
  }
  let last = {};  // the photo that was read last

  async function run(pixels, { target = -1, masks = [] } = {}) {
    const { ort, graph } = await ready, whole = value => new ort.Tensor("int64", [BigInt(value)], [1]);
    const subsets = Float32Array.from(masks.flat(2)), wanted = masks.length ? ["answers"] : outputs.concat(card.targets ? "explained" : []);
    const feeds = {
      pixels: new ort.Tensor("float32", pixels, [1, 3, height, width]), size: whole(0), target: whole(target),
      masks: new ort.Tensor("float32", masks.length ? subsets : new Float32Array(cells).fill(1), [1, masks.length || 1, ...grid]),
    };
    const taken = Object.fromEntries(graph.inputNames.map(name => [name, feeds[name]]));
    return Object.fromEntries(Object.entries(await graph.run(taken, wanted)).map(([name, tensor]) => [name, tensor.data]));
  }

  function likely(logits) {
    const most = Math.max(...logits), each = Array.from(logits, v => card.several_labels ? 1 / (1 + Math.exp(-v)) : Math.exp(v - most));
    const sum = card.several_labels ? 1 : each.reduce((a, b) => a + b, 0), probabilities = each.map(v => v / sum);
    const guess = index => ({ index, label: classes[index], probability: probabilities[index] });
    const shown = Math.max(5, card.several_labels ? probabilities.filter(p => p > .5).length : 0);
    const top = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, shown).map(guess);
    return { top, prediction: top[0], guess, present: probabilities.map(p => p > .5).join() };
  }
  const rows = values => Array.from({ length: grid[0] }, (_, y) => Array.from(values.slice(y * grid[1], (y + 1) * grid[1]), Number));

  // Photos of which only some cells' pixels are kept, the others coarse: bla.data.masking.
  const matrix = (down, across, value) => Array.from({ length: down }, (_, i) => Float64Array.from({ length: across }, (_, j) => value(i, j)));
  const turned = a => matrix(a[0].length, a.length, (i, j) => a[j][i]);
  const times = (a, b) => a.map(row => {
    const sum = new Float64Array(b[0].length);
    row.forEach((w, k) => { if (w) for (let j = 0; j < sum.length; j++) sum[j] += w * b[k][j]; });
    return sum;
  });
  const enlarging = (parts, side) => matrix(side, parts, (i, j) =>
    Math.max(0, 1 - Math.abs(Math.min(parts - 1, Math.max(0, (i + .5) * parts / side - .5)) - j)));
  const coarse = side => {
    const ends = i => [Math.floor(i * side / 12), Math.ceil((i + 1) * side / 12)];
    return times(enlarging(12, side), matrix(12, side, (i, j) => { const [from, to] = ends(i); return j >= from && j < to ? 1 / (to - from) : 0; }));
  };
  function masked(pixels, mask) {
    const kept = times(times(enlarging(grid[0], height), mask), turned(enlarging(grid[1], width))), area = width * height;
    return Float32Array.from([0, 1, 2].flatMap(c => {
      const colour = matrix(height, width, (y, x) => pixels[c * area + y * width + x]);
      const filled = times(times(coarse(height), colour), turned(coarse(width)));
      return colour.flatMap((row, y) => Array.from(row, (value, x) => filled[y][x] + kept[y][x] * (value - filled[y][x])));
    }));
  }
  async function check(pixels, selected, whole, about) {
    const asked = async keep => likely((await run(masked(pixels, selected.map(row => row.map(cell => Number(Boolean(cell) === keep)))))).classifier_logits);
    const words = ({ guess, prediction }) => say(guess(about)) + (prediction.index === about ? "" : ` (likeliest: ${say(prediction)})`);
    return { words: `from these pixels alone: ${words(await asked(true))}; without them: ${words(await asked(false))}` };
  }

  async function explained(pixels, target, checked) {
    const found = await run(pixels, { target });
    if (![found.unbounded, found.logits, found.classifier_logits].every(values => values.every(Number.isFinite)))
      throw new Error("The classifier gives no finite numbers for this photo.");
    const { top, prediction, present } = likely(found.logits), whole = likely(found.classifier_logits), selected = rows(found.selected);
    return {
      top, prediction, classifier: whole.prediction, selected, unbounded: rows(found.unbounded), grid, size: selected.flat().filter(Boolean).length,
      agrees: card.several_labels ? present === whole.present : prediction.index === whole.prediction.index,
      target: card.targets ? Number(found.explained[0]) : null,
      check: checked ? await check(pixels, selected, whole, card.targets ? Number(found.explained[0]) : whole.prediction.index) : null,
    };
  }

  async function answer(path, file, fields) {
    const asked = new URLSearchParams(path.split("?")[1]), name = asked.get("target");
    const target = name === null ? -1 : classes.includes(name) ? classes.indexOf(name) : /^\d+$/.test(name) ? Number(name) : classes.length;
    if (target >= classes.length) throw new Error(`expected the name or index of one of ${classes.length} classes, got '${name}'`);
    await ready;
    if (last.file !== file) last = await read(file);
    if (path.startsWith("/v1/explain")) return { explanations: [{ ...await explained(last.pixels, target, asked.has("check")), region: last.region }] };
    const masks = JSON.parse(fields.masks), { answers } = await run(last.pixels, { masks });
    return { answers: masks.map((mask, m) => {
      const { top, prediction, guess } = likely(answers.slice(m * classes.length, (m + 1) * classes.length));
      return { size: mask.flat().filter(Boolean).length, prediction, top, target: target < 0 ? null : guess(target) };
    }) };
  }
  return { about: Promise.resolve({ ...card, limits: { bytes: Infinity, pixels: Infinity } }), answer };
})();
