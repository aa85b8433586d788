// The page to play with: from strokes to the answers of two networks.
import * as ort from "./runtime/ort.wasm.min.mjs";

// As in drawings.py, which prepares made drawings in the same way.
const SIZE = 8;
const BOX = [6, 8];
const PEN = 1.5;
const STRETCH = 1.3;
const SMALLEST = 0.08;
const FINE = 16;

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
  const fits = [0, 1].map(
    (axis) => (BOX[axis] - PEN) / Math.max(high[axis] - low[axis], SMALLEST),
  );
  const scale = fits.map(
    (fit) => Math.min(fit, STRETCH * Math.min(...fits)) * FINE,
  );
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
            (point[axis] - (low[axis] + high[axis]) / 2) * scale[axis] +
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

// ---- what is shown

function percent(share) {
  return share > 0.995 && share < 1
    ? "> 99 %"
    : `${Math.round(100 * share)} %`;
}

function makeBars(name) {
  const bars = document.querySelector(`#play-${name} .play-bars`);
  const labels = Array.from({ length: description.classes }, (_, k) => `${k}`);
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

// The answer is the longest bar; -1 for "I don't know".
function show(name, shares) {
  const section = document.getElementById(`play-${name}`);
  const answer = section.querySelector(".play-answer");
  const rows = section.querySelectorAll(".play-bar");
  const best = shares ? shares.indexOf(Math.max(...shares)) : -1;
  rows.forEach((row, index) => {
    row.querySelector(".play-fill").style.width =
      shares ? `${100 * shares[index]}%` : "0";
    row.querySelector(".play-share").textContent =
      shares ? percent(shares[index]) : "";
    row.classList.toggle("play-best", index === best);
  });
  const refused = best === description?.classes;
  answer.classList.toggle("play-refused", refused);
  section.dataset.label = shares ? String(refused ? -1 : best) : "";
  answer.textContent = !shares
    ? "…"
    : refused
      ? "I don’t know"
      : `This is a ${best}`;
}

function drawPad() {
  drawStrokes(pad, strokes);
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

// Where digit k stands: on a ring, 0 at the top, onwards as on a clock.
function onRing(k) {
  const angle = (2 * Math.PI * k) / description.classes;
  return [Math.sin(angle), Math.cos(angle)];
}

// The mean of these places, weighted by the bars; "I don't know" is the middle.
function placeOf(shares) {
  const sum = [0, 0];
  for (let k = 0; k < description.classes; k++) {
    const [x, y] = onRing(k);
    sum[0] += shares[k] * x;
    sum[1] += shares[k] * y;
  }
  return sum;
}

function drawMap() {
  if (!description) return;
  const context = map.getContext("2d");
  const half = map.width / 2;
  const unit = half * 0.86;
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
  star(context, half, half, 26);
  context.fillStyle = "#f2b705";
  context.fill();
  context.stroke();
  context.font = "bold 34px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let digit = 0; digit < description.classes; digit++) {
    const [x, y] = at(onRing(digit));
    context.beginPath();
    context.arc(x, y, 32, 0, 2 * Math.PI);
    context.fillStyle = getComputedStyle(root).backgroundColor;
    context.fill();
    context.stroke();
    context.fillStyle = color;
    context.fillText(String(digit), x, y + 2);
  }
  map.dataset.reach = place ? String(Math.hypot(...place)) : "";
  if (!place) return;
  const [x, y] = at(place);
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
  const image = rendered();
  drawSeen(image);
  const input = new ort.Tensor("float32", image, [1, SIZE, SIZE, 1]);
  for (const name of names) {
    const session = models[name];
    const outputs = await session.run({ [session.inputNames[0]]: input });
    const shares = [...outputs[session.outputNames[0]].data];
    show(name, shares);
    if (name === "halo") place = placeOf(shares);
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

// ---- drawings to start with

// Points of an ellipse, angles in degrees, 0 to the right, 90 upwards.
function arc(x, y, width, height, start, end) {
  return Array.from({ length: 25 }, (_, step) => {
    const angle = ((start + ((end - start) * step) / 24) * Math.PI) / 180;
    return [x + width * Math.cos(angle), y - height * Math.sin(angle)];
  });
}

const SAMPLES = {
  "a 2": [[...arc(0.5, 0.33, 0.2, 0.17, 170, -40), [0.3, 0.83], [0.73, 0.83]]],
  "a 3": [
    [
      ...arc(0.48, 0.33, 0.17, 0.16, 150, -90),
      ...arc(0.48, 0.66, 0.2, 0.17, 90, -150),
    ],
  ],
  "an 8, never trained": [
    [
      ...arc(0.5, 0.32, 0.14, 0.15, -90, 270),
      ...arc(0.5, 0.66, 0.17, 0.19, 90, -270),
    ],
  ],
  "a 9, never trained": [
    [...arc(0.5, 0.34, 0.15, 0.17, 0, 360), [0.64, 0.5], [0.58, 0.86]],
  ],
  "a house": [
    [[0.2, 0.45], [0.2, 0.85], [0.8, 0.85], [0.8, 0.45], [0.2, 0.45]],
    [[0.2, 0.45], [0.5, 0.12], [0.8, 0.45]],
    [[0.42, 0.85], [0.42, 0.6], [0.58, 0.6], [0.58, 0.85]],
  ],
  "a face": [
    arc(0.5, 0.5, 0.4, 0.4, 0, 360),
    arc(0.36, 0.38, 0.04, 0.04, 0, 360),
    arc(0.64, 0.38, 0.04, 0.04, 0, 360),
    arc(0.5, 0.58, 0.2, 0.14, 200, 340),
  ],
};

function drawStrokes(canvas, drawn) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = canvas.width / 18;
  for (const stroke of drawn) {
    trace(
      context,
      stroke.map(([x, y]) => [x * canvas.width, y * canvas.height]),
    );
  }
}

const samples = document.getElementById("play-samples");
samples.append(
  ...Object.entries(SAMPLES).map(([name, drawn]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", `Draw ${name}`);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 96;
    button.append(canvas);
    button.addEventListener("click", () => {
      strokes = drawn.map((stroke) => [...stroke]);
      drawing = null;
      drawPad();
      ask();
    });
    return button;
  }),
);

function drawSamples() {
  Object.values(SAMPLES).forEach((drawn, number) =>
    drawStrokes(samples.children[number].firstChild, drawn),
  );
}

// The colours follow the scheme of the page.
new MutationObserver(() => {
  drawPad();
  drawSamples();
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
  description = await (await load("models.json")).json();
  names.forEach(makeBars);
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
drawSamples();
drawSeen(null);
start().catch((error) => {
  say("failed", `The networks could not be loaded: ${error.message}`);
  throw error;
});
