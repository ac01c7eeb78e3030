// Classifies a video in the page, by a model from `timesformer export --to=onnx --preprocess`.
import * as ort from "./ort/ort.wasm.min.mjs";

const TOP = 5;
// Into a frame, so that the one before it is not shown.
const INTO = 0.001;

const byId = (id) => document.getElementById(id);
const say = (text) => (byId("state").textContent = text);

// The card is beside the model: model.json of model.onnx. ?model=NAME chooses another.
const name = new URLSearchParams(location.search).get("model") ?? "model";
let card, session;

async function load() {
  card = await (await read(`${name}.json`)).json();
  if (card.input.dtype !== "uint8") throw new Error("export the model with --preprocess");
  const model = await (await read(`${name}.onnx`)).arrayBuffer();
  session = await ort.InferenceSession.create(model);
  const license = card.license ? ` License of the weights: ${card.license}.` : "";
  byId("about").textContent =
    `${card.output.shape[1]} classes, ${card.clip.frames} frames of a video.${license}`;
  byId("file").disabled = false;
}

async function read(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} is not there (${answer.status})`);
  return answer;
}

// Seconds of the frames of the middle clip, as `timesformer predict` samples them.
export function sampleTimes(clip, duration) {
  const frames = [...Array(clip.frames).keys()];
  if (clip.sampling === "segments") {
    return frames.map((i) => ((i + 0.5) * duration) / clip.frames - INTO);
  }
  const span = (clip.frame_stride * clip.frames) / 30;
  const start = clip.start === "first" ? 0 : Math.max(duration - span, 0) / 2;
  const step = clip.frames > 1 ? (span - 1 / 30) / (clip.frames - 1) : 0;
  return frames.map((i) => Math.min(start + i * step + INTO, duration - 1 / 60));
}

function happened(target, event) {
  return new Promise((resolve, reject) => {
    target.addEventListener(event, resolve, { once: true });
    target.addEventListener("error", () => reject(new Error("this browser cannot play it")), {
      once: true,
    });
  });
}

// Canvases of the clip's frames, their shorter side as the model expects it.
async function framesOf(file, clip) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  const loaded = happened(video, "loadeddata");
  video.src = URL.createObjectURL(file);
  try {
    await loaded;
    const scale = clip.short_side / Math.min(video.videoWidth, video.videoHeight);
    const found = [];
    for (const time of sampleTimes(clip, video.duration)) {
      const seeked = happened(video, "seeked");
      video.currentTime = Math.max(time, 0);
      await seeked;
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(video.videoWidth * scale);
      canvas.height = Math.round(video.videoHeight * scale);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.imageSmoothingQuality = "high";
      context.drawImage(video, 0, 0, canvas.width, canvas.height);
      found.push(canvas);
    }
    return found;
  } finally {
    URL.revokeObjectURL(video.src);
  }
}

function asTensor(canvases) {
  const { width, height } = canvases[0];
  const data = new Uint8Array(canvases.length * height * width * 3);
  let next = 0;
  for (const canvas of canvases) {
    const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
    for (let i = 0; i < pixels.length; i += 4) {
      data[next++] = pixels[i];
      data[next++] = pixels[i + 1];
      data[next++] = pixels[i + 2];
    }
  }
  return new ort.Tensor("uint8", data, [1, canvases.length, height, width, 3]);
}

function show(probabilities) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  byId("classes").replaceChildren(
    ...order.slice(0, TOP).map((index) => {
      const item = document.createElement("li");
      const share = `${(100 * probabilities[index]).toFixed(1)}%`;
      for (const text of [card.labels[index] ?? `class ${index}`, share]) {
        item.append(Object.assign(document.createElement("span"), { textContent: text }));
      }
      item.style.setProperty("--share", share);
      return item;
    }),
  );
}

async function classify(file) {
  say(`${file.name} is read ...`);
  const canvases = await framesOf(file, card.clip);
  byId("frames").replaceChildren(...canvases);
  say(`${file.name} is classified ...`);
  const begin = performance.now();
  const outputs = await session.run({ [card.input.name]: asTensor(canvases) });
  show(outputs[card.output.name].data);
  byId("result").hidden = false;
  say(`${file.name}: ${((performance.now() - begin) / 1000).toFixed(1)} s`);
}

byId("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  byId("file").disabled = true;
  byId("result").hidden = true;
  await classify(file).catch((error) => say(`${file.name}: ${error.message}`));
  byId("file").disabled = false;
});

load().catch((error) => (byId("about").textContent = `The model cannot be loaded: ${error.message}`));
