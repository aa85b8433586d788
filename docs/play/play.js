// The page to play with: from strokes to the answers of two networks.
import * as ort from "./runtime/ort.wasm.min.mjs";

const SIZE = 28;
const BOX = 20;
// As in drawings.py, which prepares made drawings in the same way.
const PEN = 2.2;
const FINE = 8;
// Below this share of the pad a drawing is a dot, and is not blown up.
const SMALLEST = 0.08;

const here = new URL(".", import.meta.url);
const root = document.getElementById("play");
const pad = document.getElementById("play-pad");
const seen = document.getElementById("play-seen");
const map = document.getElementById("play-map");
const message = document.getElementById("play-message");
const names = ["halo", "cross-entropy"];

let strokes = [];
let models;
let description;
let place = null;

// ---- from strokes to an image as MNIST has them

function bounds() {
  const low = [Infinity, Infinity];
  const high = [-Infinity, -Infinity];
  for (const point of strokes.flat()) {
    for (const axis of [0, 1]) {
      low[axis] = Math.min(low[axis], point[axis]);
      high[axis] = Math.max(high[axis], point[axis]);
    }
  }
  return [low, high];
}

function trace(context, points) {
  context.beginPath();
  context.moveTo(...points[0]);
  // A dot is a line of no length.
  for (const point of points.length > 1 ? points.slice(1) : points) {
    context.lineTo(...point);
  }
  context.stroke();
}

function rendered() {
  const [low, high] = bounds();
  const extent = Math.max(high[0] - low[0], high[1] - low[1], SMALLEST);
  const scale = ((BOX - PEN) / extent) * FINE;
  const canvas = new OffscreenCanvas(SIZE * FINE, SIZE * FINE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = PEN * FINE;
  for (const stroke of strokes) {
    trace(
      context,
      stroke.map((point) =>
        [0, 1].map(
          (axis) =>
            (point[axis] - (low[axis] + high[axis]) / 2) * scale +
            (SIZE * FINE) / 2,
        ),
      ),
    );
  }
  const alpha = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const image = new Float32Array(SIZE * SIZE);
  for (let row = 0; row < SIZE * FINE; row++) {
    for (let column = 0; column < SIZE * FINE; column++) {
      const pixel =
        Math.floor(row / FINE) * SIZE + Math.floor(column / FINE);
      image[pixel] +=
        alpha[4 * (row * SIZE * FINE + column) + 3] / 255 / FINE / FINE;
    }
  }
  return image;
}

function centered(image) {
  let mass = 0;
  let down = 0;
  let right = 0;
  image.forEach((value, index) => {
    mass += value;
    down += value * (Math.floor(index / SIZE) + 0.5);
    right += value * ((index % SIZE) + 0.5);
  });
  down = Math.round(SIZE / 2 - down / mass);
  right = Math.round(SIZE / 2 - right / mass);
  const shifted = new Float32Array(SIZE * SIZE);
  for (let row = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++) {
      const [from, side] = [row - down, column - right];
      if (from >= 0 && from < SIZE && side >= 0 && side < SIZE) {
        shifted[row * SIZE + column] = image[from * SIZE + side];
      }
    }
  }
  return shifted;
}

// ---- what is shown

function percent(share) {
  return share > 0.995 && share < 1
    ? "> 99 %"
    : `${Math.round(100 * share)} %`;
}

function makeBars(name) {
  const bars = document.querySelector(`#play-${name} .play-bars`);
  const labels = [..."0123456789"];
  if (name === "halo") labels.push("I don’t know");
  bars.replaceChildren(
    ...labels.map((label) => {
      const row = document.createElement("div");
      row.className = "play-bar";
      row.innerHTML =
        '<span class="play-label"></span><span class="play-track">' +
        '<span class="play-fill"></span></span>' +
        '<span class="play-share"></span>';
      row.firstChild.textContent = label;
      return row;
    }),
  );
}

function show(name, outputs) {
  const section = document.getElementById(`play-${name}`);
  const answer = section.querySelector(".play-answer");
  const strange = section.querySelector(".play-strange");
  const rows = section.querySelectorAll(".play-bar");
  if (!outputs) {
    answer.textContent = "…";
    strange.textContent = "";
    section.dataset.label = "";
    rows.forEach((row) => {
      row.querySelector(".play-fill").style.width = "0";
      row.querySelector(".play-share").textContent = "";
      row.classList.remove("play-best");
    });
    return;
  }
  const shares = outputs.probabilities.data;
  const label = Number(outputs.label.data[0]);
  const score = outputs.score.data[0];
  const limit = description[name].threshold;
  const best = shares.indexOf(Math.max(...shares));
  rows.forEach((row, index) => {
    row.querySelector(".play-fill").style.width = `${100 * shares[index]}%`;
    row.querySelector(".play-share").textContent = percent(shares[index]);
    row.classList.toggle("play-best", index === best);
  });
  section.dataset.label = String(label);
  answer.textContent = label < 0 ? "I don’t know" : `This is a ${label}`;
  answer.classList.toggle("play-refused", label < 0);
  const what = name === "halo" ? "How strange" : "How unsure";
  const digits = name === "halo" ? 1 : 3;
  strange.textContent =
    `${what}: ${score.toFixed(digits)}, ` +
    `limit ${limit.toFixed(digits)}: ` +
    (label < 0 ? "above it." : "within it.");
}

function drawPad() {
  const context = pad.getContext("2d");
  context.clearRect(0, 0, pad.width, pad.height);
  context.strokeStyle = getComputedStyle(pad).color;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = pad.width / 18;
  for (const stroke of strokes) {
    trace(
      context,
      stroke.map(([x, y]) => [x * pad.width, y * pad.height]),
    );
  }
}

function drawSeen(image) {
  const context = seen.getContext("2d");
  const pixels = context.createImageData(SIZE, SIZE);
  for (let index = 0; index < SIZE * SIZE; index++) {
    const value = image ? Math.round(255 * image[index]) : 0;
    pixels.data.set([value, value, value, 255], 4 * index);
  }
  context.putImageData(pixels, 0, 0);
}

function star(context, x, y, radius) {
  context.beginPath();
  for (let tip = 0; tip < 10; tip++) {
    const length = tip % 2 ? radius * 0.45 : radius;
    const angle = (Math.PI * tip) / 5;
    context.lineTo(
      x + length * Math.sin(angle),
      y - length * Math.cos(angle),
    );
  }
  context.closePath();
}

function drawMap() {
  if (!description) return;
  const context = map.getContext("2d");
  const half = map.width / 2;
  const unit = half * 0.66;
  const at = ([x, y]) => [half + x * unit, half - y * unit];
  const color = getComputedStyle(map).color;
  context.clearRect(0, 0, map.width, map.height);
  context.strokeStyle = color;
  context.fillStyle = color;
  context.lineWidth = 1;
  context.globalAlpha = 0.35;
  context.beginPath();
  context.arc(half, half, unit, 0, 2 * Math.PI);
  context.stroke();
  context.globalAlpha = 1;
  star(context, half, half, 20);
  context.fillStyle = "#f2b705";
  context.fill();
  context.stroke();
  context.font = "bold 30px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  description.ring.forEach((centroid, digit) => {
    const [x, y] = at(centroid);
    context.beginPath();
    context.arc(x, y, 26, 0, 2 * Math.PI);
    context.stroke();
    context.fillStyle = color;
    context.fillText(String(digit), x, y + 2);
  });
  if (!place) return;
  // Beyond the edge the dot is kept at it.
  const reach = Math.hypot(...place);
  const inside = Math.min(1, 1.4 / Math.max(reach, 1e-6));
  const [x, y] = at(place.map((value) => value * inside));
  context.beginPath();
  context.arc(x, y, 15, 0, 2 * Math.PI);
  context.fillStyle = "#e8590c";
  context.fill();
  context.lineWidth = 3;
  context.strokeStyle = "#fff";
  context.stroke();
}

function say(state, text) {
  root.dataset.state = state;
  message.textContent = text;
}

// ---- asking the networks, one drawing after the other

let running = false;
let again = false;

async function ask() {
  if (running) {
    again = true;
    return;
  }
  running = true;
  do {
    again = false;
    await answer();
  } while (again);
  running = false;
}

async function answer() {
  if (!models) return;
  if (strokes.length === 0) {
    place = null;
    drawSeen(null);
    names.forEach((name) => show(name, null));
    drawMap();
    say("empty", "The box is empty: there is nothing to name.");
    return;
  }
  root.dataset.state = "thinking";
  const image = centered(rendered());
  drawSeen(image);
  const input = new ort.Tensor("float32", image, [1, SIZE, SIZE, 1]);
  for (const name of names) {
    const session = models[name];
    const outputs = await session.run({ [session.inputNames[0]]: input });
    show(name, outputs);
    if (outputs.map) place = [...outputs.map.data];
  }
  drawMap();
  say("answered", "Go on drawing, or clear the box.");
}

// ---- mouse, pen and finger

function position(event) {
  const box = pad.getBoundingClientRect();
  return [
    (event.clientX - box.left) / box.width,
    (event.clientY - box.top) / box.height,
  ];
}

let drawing = null;

pad.addEventListener("pointerdown", (event) => {
  if (drawing !== null || event.button !== 0) return;
  drawing = event.pointerId;
  pad.setPointerCapture(event.pointerId);
  strokes.push([position(event)]);
  drawPad();
  ask();
  event.preventDefault();
});

pad.addEventListener("pointermove", (event) => {
  if (event.pointerId !== drawing) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const each of events.length ? events : [event]) {
    strokes.at(-1).push(position(each));
  }
  drawPad();
  ask();
});

for (const end of ["pointerup", "pointercancel"]) {
  pad.addEventListener(end, (event) => {
    if (event.pointerId !== drawing) return;
    drawing = null;
    ask();
  });
}

document.getElementById("play-clear").addEventListener("click", () => {
  strokes = [];
  drawing = null;
  drawPad();
  ask();
});

// The colours follow the scheme of the page.
new MutationObserver(() => {
  drawPad();
  drawMap();
}).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });

async function start() {
  ort.env.wasm.wasmPaths = new URL("runtime/", here).href;
  // Threads would need headers that a plain web server does not send.
  ort.env.wasm.numThreads = 1;
  const load = async (name) => {
    const answer = await fetch(new URL(`models/${name}`, here));
    if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
    return answer;
  };
  names.forEach(makeBars);
  description = await (await load("models.json")).json();
  drawMap();
  const sessions = {};
  for (const name of names) {
    const bytes = await (await load(`${name}.onnx`)).arrayBuffer();
    sessions[name] = await ort.InferenceSession.create(
      new Uint8Array(bytes),
      { executionProviders: ["wasm"] },
    );
  }
  models = sessions;
  await ask();
}

drawPad();
drawSeen(null);
start().catch((error) => {
  say("failed", `The networks could not be loaded: ${error.message}`);
  throw error;
});
