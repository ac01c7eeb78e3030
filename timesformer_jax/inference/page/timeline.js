// The chart follows the video, and the video follows clicks and keys in the chart. Without a video
// that plays, the chart has a position of its own.
(function followVideo() {
  const get = (id) => document.getElementById(id);
  const [video, slider, head, hover, now] = ["video", "slider", "head", "hover", "now"].map(get);
  const buttons = [...document.querySelectorAll("[data-seek]")];
  const length = timeline.end - timeline.start;
  let plays = Boolean(video);
  let position = timeline.start;

  if (video && video.src.startsWith("data:")) video.src = blobAddress(video.src);

  function clock(seconds) {
    const tenths = Math.round(10 * seconds);
    const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
    const rest = `${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
    return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
  }

  // The number of the clip whose middle is nearest.
  function nearest(seconds) {
    const times = timeline.times;
    let [low, high] = [0, times.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] < seconds) low = middle + 1;
      else high = middle;
    }
    return low && seconds - times[low - 1] < times[low] - seconds ? low - 1 : low;
  }

  function show(seconds) {
    position = seconds;
    const share = Math.min(Math.max((seconds - timeline.start) / length, 0), 1);
    head.style.left = `${100 * share}%`;
    const found = timeline.top[nearest(seconds)];
    now.replaceChildren(
      ...found.map(([label, probability]) => {
        const [row, score, name] = ["p", "span", "span"].map((tag) => document.createElement(tag));
        score.className = "score";
        score.textContent = `${(100 * probability).toFixed(1)}%`;
        name.textContent = timeline.labels[label];
        row.append(score, name);
        return row;
      }),
    );
    slider.setAttribute("aria-valuenow", seconds.toFixed(2));
    slider.setAttribute("aria-valuetext", `${clock(seconds)}: ${timeline.labels[found[0][0]]}`);
    for (const button of buttons) {
      const inside = button.dataset.seek <= seconds && seconds < button.dataset.end;
      button.setAttribute("aria-current", inside);
    }
  }

  function seek(seconds) {
    const target = Math.min(Math.max(seconds, timeline.start), timeline.end);
    if (plays) video.currentTime = target;
    show(target);
  }

  function at(event) {
    const box = slider.getBoundingClientRect();
    return timeline.start + (length * (event.clientX - box.left)) / box.width;
  }

  slider.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    slider.setPointerCapture(event.pointerId);
    seek(at(event));
  });
  slider.addEventListener("pointermove", (event) => {
    if (slider.hasPointerCapture(event.pointerId)) seek(at(event));
    const share = (at(event) - timeline.start) / length;
    hover.hidden = share < 0 || share > 1;
    hover.style.left = `${100 * share}%`;
    hover.classList.toggle("late", share > 0.5);
    const [label, probability] = timeline.top[nearest(at(event))][0];
    const text = `${clock(at(event))} ${timeline.labels[label]} ${Math.round(100 * probability)}%`;
    hover.firstElementChild.textContent = text;
  });
  slider.addEventListener("pointerleave", () => (hover.hidden = true));

  const keys = {
    ArrowLeft: () => position - timeline.stride,
    ArrowRight: () => position + timeline.stride,
    PageDown: () => position - 10 * timeline.stride,
    PageUp: () => position + 10 * timeline.stride,
    Home: () => timeline.start,
    End: () => timeline.end,
  };
  slider.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    seek(keys[event.key]());
  });
  for (const button of buttons) {
    // Browsers round times: at the very start the subtitle of the segment before may still be there.
    button.addEventListener("click", () => seek(Number(button.dataset.seek) + 0.002));
  }

  function follow() {
    show(video.currentTime);
    if (!video.paused) requestAnimationFrame(follow);
  }
  if (video) {
    video.addEventListener("play", follow);
    for (const event of ["pause", "seeked", "timeupdate"]) {
      video.addEventListener(event, () => show(video.currentTime));
    }
    video.addEventListener("error", () => {
      plays = false;
      get("problem").hidden = false;
      video.hidden = true;
    });
    if (timeline.start > 0) {
      video.addEventListener("loadedmetadata", () => seek(timeline.start), { once: true });
    }
  }
  show(position);
})();
