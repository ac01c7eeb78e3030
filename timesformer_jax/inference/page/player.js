"use strict";

// A video with its controls and keys: space plays and pauses, the left and right arrows go from stop
// to stop (`stops`, ascending seconds; without them, by a second).
// Calls `show(seconds)` for every picture. Returns {video, seek(seconds), step(count)}.
function createPlayer(root, { stops = [], show = () => {} } = {}) {
  const video = root.querySelector("video");
  const [play, scrub, time, speed] = ["play", "scrub", "time", "speed"].map((name) =>
    root.querySelector(`[data-${name}]`),
  );
  const tolerance = 0.02; // less than a frame: the times of stops lie within their frames
  if (video.src.startsWith("data:")) video.src = blobAddress(video.src);

  function duration() {
    return Number.isFinite(video.duration) ? video.duration : 0;
  }

  function refresh() {
    const now = video.currentTime;
    scrub.max = duration();
    scrub.value = now;
    time.textContent = `${now.toFixed(2)} s`;
    scrub.setAttribute("aria-valuetext", `${now.toFixed(2)} of ${duration().toFixed(2)} seconds`);
    root.classList.toggle("playing", !video.paused);
    play.setAttribute("aria-label", video.paused ? "Play" : "Pause");
    show(now);
  }

  function follow() {
    refresh();
    if (!video.paused) requestAnimationFrame(follow);
  }

  function toggle() {
    if (video.paused) video.play();
    else video.pause();
  }

  function seek(seconds) {
    video.currentTime = Math.min(Math.max(seconds, 0), duration());
    refresh();
  }

  function step(count) {
    video.pause();
    const now = video.currentTime;
    if (!stops.length) return seek(now + count);
    const later = stops.findIndex((stop) => stop > now + tolerance);
    const next = later < 0 ? stops.length : later;
    const here = next - 1;
    // Backwards from between two stops, the first step goes to the one before.
    const between = here >= 0 && now > stops[here] + tolerance;
    const target = here + count + (count < 0 && between ? 1 : 0);
    return seek(stops[Math.min(Math.max(target, 0), stops.length - 1)]);
  }

  play.addEventListener("click", toggle);
  video.addEventListener("click", toggle);
  scrub.addEventListener("input", () => seek(Number(scrub.value)));
  speed.addEventListener("change", () => (video.playbackRate = Number(speed.value)));
  video.addEventListener("play", follow);
  for (const event of ["pause", "seeked", "loadedmetadata", "loadeddata"]) {
    video.addEventListener(event, refresh);
  }
  const keys = { " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !keys[event.key]) return;
    // Controls keep the keys that they have themselves.
    if (event.target.closest("input, select, textarea, a")) return;
    if (event.target.closest("button") && event.key === " ") return;
    event.preventDefault();
    keys[event.key]();
  });
  if (video.readyState > 0) refresh();
  return { video, seek, step };
}

// Some browsers seek in a blob, but not in a data URI.
function blobAddress(uri) {
  const [head, body] = uri.split(",", 2);
  const bytes = Uint8Array.from(atob(body), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] }));
}

(function chooseTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    document.dispatchEvent(new Event("themechange"));
  });
})();
