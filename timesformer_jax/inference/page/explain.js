"use strict";

(function explain() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [rows, columns] = data.grid;
  const canvas = document.getElementById("heat");
  const strength = document.getElementById("strength");
  const frames = [...document.querySelectorAll("[data-frame]")];
  let chosen = Number(document.querySelector("[name=map]:checked").value);
  let current = -1;

  // A level from 0 to 255 as [red, green, blue].
  function colour(level) {
    const at = (level / 255) * (data.colours.length - 1);
    const below = Math.min(Math.floor(at), data.colours.length - 2);
    return data.colours[below].map((c, i) => c + (at - below) * (data.colours[below + 1][i] - c));
  }

  // The heat of a frame, a pixel for every patch; its opacity grows with the level.
  function patches(map, frame) {
    const image = new ImageData(columns, rows);
    data.maps[map].levels[frame].forEach((level, i) => {
      image.data.set([...colour(level), level], 4 * i);
    });
    const small = document.createElement("canvas");
    [small.width, small.height] = [columns, rows];
    small.getContext("2d").putImageData(image, 0, 0);
    return small;
  }

  // A row and a column more at every edge, so that the middle of a patch keeps its place.
  function enlarged(small) {
    const wide = document.createElement("canvas");
    [wide.width, wide.height] = [columns + 2, rows + 2];
    const context = wide.getContext("2d");
    context.imageSmoothingEnabled = false;
    for (const [dx, dy] of [[0, 1], [2, 1], [1, 0], [1, 2], [0, 0], [2, 0], [0, 2], [2, 2]]) {
      context.drawImage(small, dx, dy);
    }
    context.clearRect(1, 1, columns, rows);
    context.drawImage(small, 1, 1);
    return wide;
  }

  const pictures = data.maps.map((map, m) => map.levels.map((_, t) => enlarged(patches(m, t))));

  function draw(target, frame) {
    const { width, height } = target;
    const context = target.getContext("2d");
    const [top, left, side] = [data.box[0] * height, data.box[1] * width, data.box[2] * height];
    context.clearRect(0, 0, width, height);
    context.fillStyle = `rgb(0 0 0 / ${1 - data.outside})`;
    context.fillRect(0, 0, width, height);
    context.clearRect(left, top, side, side);
    context.save();
    context.beginPath();
    context.rect(left, top, side, side);
    context.clip();
    context.globalAlpha = Number(strength.value);
    const [x, y] = [side / columns, side / rows];
    context.drawImage(pictures[chosen][frame], left - x, top - y, side + 2 * x, side + 2 * y);
    context.restore();
    const line = Math.max(1, width / 400);
    context.lineWidth = line;
    context.strokeStyle = "rgb(255 255 255 / 75%)";
    context.strokeRect(left + line / 2, top + line / 2, side - line, side - line);
  }

  function nearest(seconds) {
    const away = data.stops.map((stop) => Math.abs(stop - seconds));
    return away.indexOf(Math.min(...away));
  }

  function show(seconds) {
    const frame = nearest(seconds);
    if (frame === current) return;
    current = frame;
    draw(canvas, frame);
    frames.forEach((button, i) => button.setAttribute("aria-current", i === frame));
    const [strip, item] = [document.getElementById("strip"), frames[frame].parentElement];
    strip.scrollLeft = item.offsetLeft - strip.offsetLeft - (strip.clientWidth - item.clientWidth) / 2;
  }

  function redraw() {
    const shares = data.maps[chosen].time;
    const most = Math.max(...shares) || 1;
    const equal = Math.min(1 / shares.length / most, 1);
    document.getElementById("strip").style.setProperty("--equal", `${100 * equal}%`);
    frames.forEach((button, i) => {
      const percent = (100 * shares[i]).toFixed(1);
      button.querySelector(".column span").style.height = `${(100 * shares[i]) / most}%`;
      button.querySelector(".share").textContent = `${percent}%`;
      const [picture, small] = [button.querySelector("img"), button.querySelector("canvas")];
      if (!picture.naturalWidth) return;
      [small.width, small.height] = [picture.naturalWidth, picture.naturalHeight];
      draw(small, i);
    });
    document.getElementById("strength-value").textContent = `${Math.round(100 * strength.value)}%`;
    current = -1;
    show(player.video.currentTime);
  }

  const ramp = data.colours.map((c) => `rgb(${c.join(" ")})`).join(", ");
  document.querySelector("[data-ramp]").style.background = `linear-gradient(90deg, ${ramp})`;
  const player = createPlayer(document.getElementById("player"), { stops: data.stops, show });
  frames.forEach((button, i) => {
    button.addEventListener("click", () => {
      player.video.pause();
      player.seek(data.stops[i]);
    });
    button.querySelector("img").addEventListener("load", redraw);
  });
  strength.addEventListener("input", redraw);
  document.getElementById("maps").addEventListener("change", (event) => {
    chosen = Number(event.target.value);
    redraw();
  });
  redraw();
})();
