"use strict";
// Clips play while the pointer is on them, or by click, or by their button from the keyboard.
const still = matchMedia("(prefers-reduced-motion: reduce)");
function start(video) {
  // A pause or another page may come before it plays; what cannot be played has an error event.
  video.play().catch(error => { if (!["AbortError", "NotSupportedError"].includes(error.name)) throw error; });
}
function playable(stage, video, name, held = () => false) {
  const button = document.createElement("button");
  Object.assign(button, {type: "button", className: "play"});
  stage.append(button);
  const tell = () => {
    button.textContent = video.paused ? "\u25b6" : "\u275a\u275a";
    button.ariaPressed = String(!video.paused);
    button.ariaLabel = (video.paused ? "Play: " : "Pause: ") + name;
  };
  tell();
  for (const event of ["play", "pause"]) video.addEventListener(event, tell);
  let pinned = false;  // what hovering has begun, a click keeps going
  stage.addEventListener("click", () => {
    pinned = video.paused || !pinned;
    if (pinned) start(video); else video.pause();
  });
  stage.addEventListener("pointerenter", event => { if (event.pointerType === "mouse" && !still.matches) start(video); });
  stage.addEventListener("pointerleave", () => { if (!pinned && !held()) video.pause(); });
}
for (const video of document.querySelectorAll("video[data-clip]")) {  // without scripts they keep their own controls
  const stage = document.createElement("div");
  stage.className = "stage";
  video.replaceWith(stage);
  stage.append(video);
  video.controls = false;
  playable(stage, video, video.ariaLabel);
}
