// The canvases: heat maps (a row a head, a column a step; level 0 is a gap), and attention maps
// with their scrubber, at every step of which each run shows its newest map.
const MODES = ["normal", "benign collapse", "malignant collapse", "uniform"];
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = color => [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));

function paint(canvas, cols, rows, levels, colorOf) {
  canvas.width = cols;
  canvas.height = rows;
  const image = new ImageData(cols, rows);
  levels.forEach((level, at) => image.data.set(colorOf(level), 4 * at));
  canvas.getContext("2d", {willReadFrequently: true}).putImageData(image, 0, 0);
}

// The column and row of a canvas that a pointer is over; null beside it.
function pixelAt(canvas, event, cols, rows) {
  const area = canvas.getBoundingClientRect();
  const col = Math.floor((event.clientX - area.left) / area.width * cols);
  const row = Math.floor((event.clientY - area.top) / area.height * rows);
  return col >= 0 && row >= 0 && col < cols && row < rows ? {col, row} : null;
}

const mixed = (from, to, f) => from.map((value, at) => Math.round(value + (to[at] - value) * f));
function paintHeat(canvas) {
  const levels = bytes(canvas.dataset.levels), cols = canvas.dataset.steps.split(",").length;
  const modes = [0, 1, 2, 3].map(mode => [...rgb(css("--mode-" + mode)), 255]);
  const [low, middle, high] = ["--low", "--middle", "--high"].map(name => rgb(css(name)));
  const ramp = Array.from({length: 256}, (_, level) => {
    const f = (level - 1) / 254 * 2;
    return [...(f < 1 ? mixed(low, middle, f) : mixed(middle, high, f - 1)), 255];
  });
  const colors = canvas.dataset.kind === "mode" ? [null, ...modes] : ramp;
  const colorOf = level => level ? colors[level] : [0, 0, 0, 0];
  paint(canvas, cols, levels.length / cols, levels, colorOf);
}

function heatValue(canvas, event) {
  const at = pixelAt(canvas, event, canvas.width, canvas.height);
  if (!at) return hide(canvas);
  const level = bytes(canvas.dataset.levels)[at.row * canvas.width + at.col];
  let value = short((level - 1) / 254 * canvas.dataset.scale);
  if (canvas.dataset.kind === "mode") value = MODES[level - 1];
  if (!level) value = "no number";
  const step = canvas.dataset.steps.split(",")[at.col];
  const head = canvas.dataset.heads.split("|")[at.row];
  box.innerHTML = "<b>step " + step + "</b><br>" + escaped(head) + ": " + value;
  place(event);
}

const heats = document.querySelectorAll(".heat canvas");
for (const canvas of heats) {
  canvas.addEventListener("pointermove", event => heatValue(canvas, event));
  canvas.addEventListener("pointerleave", () => hide(canvas));
}

const maps = dataOf("maps");
const slider = document.getElementById("step"), player = document.getElementById("play");
let chosen = maps.runs.length ? maps.runs[0].cells[0] : null;
const isAt = (cell, like) => cell.block === like.block && cell.head === like.head;
const cellOf = (run, like) => run.cells.find(cell => isAt(cell, like));
const buttonsOf = number => document.querySelectorAll("#small-" + number + " button");

function frameOf(cell) {
  const at = cell ? cell.at[+slider.value] : -1;
  return at >= 0 ? cell.frames[at] : null;
}

function paintMap(canvas, frame, color) {
  if (!frame) {
    canvas.width = canvas.height = 1;
    return;
  }
  if (typeof frame.levels === "string") frame.levels = bytes(frame.levels);
  paint(canvas, frame.cols, frame.rows, frame.levels, level => [...color, level]);
}

function drawBig(run, number) {
  const cell = cellOf(run, chosen), frame = frameOf(cell);
  const figure = document.getElementById("big-" + number);
  paintMap(figure.querySelector("canvas"), frame, rgb(css(run.color)));
  const facts = ["block " + chosen.block + ", head " + chosen.head];
  if (!frame) facts.push(cell ? "not logged yet" : "not logged in this run");
  else {
    facts.push("step " + frame.step);
    if (frame.entropy !== null) facts.push("entropy " + short(frame.entropy) + " nats");
    if (frame.map_rank !== null) facts.push("effective rank " + short(frame.map_rank));
  }
  const mode = frame ? frame.mode : null;
  const named = mode === null ? "" : " · <b class='at-mode' style='--mode:var(--mode-" + mode
    + ")'>" + MODES[mode] + "</b>";
  figure.querySelector("p").innerHTML = escaped(facts.join(" · ")) + named;
}

function drawMaps() {
  if (!chosen) return;
  document.getElementById("at").textContent = "step " + maps.steps[+slider.value];
  maps.runs.forEach((run, number) => {
    drawBig(run, number);
    for (const button of buttonsOf(number)) {
      const cell = run.cells[+button.dataset.cell];
      paintMap(button.firstChild, frameOf(cell), rgb(css(run.color)));
      button.setAttribute("aria-pressed", isAt(cell, chosen));
    }
  });
}

function mapValue(canvas, run, event) {
  const frame = frameOf(cellOf(run, chosen));
  const at = frame && pixelAt(canvas, event, frame.cols, frame.rows);
  if (!at) return hide(canvas);
  const share = (frame.levels[at.row * frame.cols + at.col] / 255) ** 2;
  box.innerHTML = "row " + (at.row + 1) + ", column " + (at.col + 1) + ": " + short(share);
  place(event);
}

let timer = null;
function stop() {
  clearInterval(timer);
  timer = null;
  player.textContent = "▶ play";
}
function play() {
  if (timer) return stop();
  if (+slider.value >= +slider.max) slider.value = 0;
  player.textContent = "❚❚ pause";
  drawMaps();
  timer = setInterval(() => {
    slider.value = +slider.value + 1;
    drawMaps();
    if (+slider.value >= +slider.max) stop();
  }, 250);
}

if (slider) {
  maps.runs.forEach((run, number) => {
    const canvas = document.querySelector("#big-" + number + " canvas");
    canvas.addEventListener("pointermove", event => mapValue(canvas, run, event));
    canvas.addEventListener("pointerleave", () => hide(canvas));
    for (const button of buttonsOf(number))
      button.addEventListener("click", () => {
        chosen = run.cells[+button.dataset.cell];
        drawMaps();
      });
  });
  slider.addEventListener("input", drawMaps);
  player.addEventListener("click", play);
}

function draw() {
  heats.forEach(paintHeat);
  drawMaps();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
