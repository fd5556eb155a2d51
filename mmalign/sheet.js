// Follows clips.js. All texts of the table reach the page as text (textContent, attributes), never as markup.
const {scores, items} = JSON.parse(document.getElementById("data").textContent);
const PAGE = 48;  // a browser plays some 75 clips at a time
const at = id => document.getElementById(id);
let page = 0, down = false, found = [];
items.forEach((item, i) => { item.order = i; item.text = item.prompt.toLowerCase(); });

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function figure(x) {
  if (x === null) return "\u2013";
  if (Number.isInteger(x) && Math.abs(x) < 1e7) return String(x);
  const size = Math.abs(x);
  return size >= 1e-4 && size < 1e7 ? x.toFixed(Math.max(0, Math.min(8, 3 - Math.floor(Math.log10(size))))) : x.toExponential(3);
}
function status(item) {
  return item.fault ? "missing" : Object.keys(item.reasons).length ? "failed" : "ok";
}

// ---- which items, in which order
function matches(item) {
  const text = at("text").value.trim().toLowerCase(), model = at("model"), wanted = at("status").value;
  if (text && !item.text.includes(text)) return false;
  if (model.selectedIndex > 0 && item.model !== model.value) return false;
  if (wanted && status(item) !== wanted) return false;
  const low = at("low").valueAsNumber, high = at("high").valueAsNumber;
  if (Number.isNaN(low) && Number.isNaN(high)) return true;
  const value = item.scores[Number(at("ranged").value)];
  return value !== null && !(value < low) && !(value > high);
}
function key(item) {
  const sort = at("sort").value;
  return sort in {order: 1, seed: 1, text: 1} ? item[sort] : sort === "prompt" ? item.text : item.scores[Number(sort)];
}
function compare(a, b) {
  const x = key(a), y = key(b), sign = down ? -1 : 1;
  if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;  // without a value: last
  return x === y ? a.order - b.order : x < y ? -sign : sign;
}
function arrange() {
  found = items.filter(matches).sort(compare);
  page = 0;
  draw();
}

// ---- tiles
function note(stage, text) {
  stage.replaceChildren(make("span", {className: "fault", role: "img", ariaLabel: text, textContent: text}));
}
function unplayable(item) {
  const name = item.file ? decodeURIComponent(item.file.split("/").pop()) : "it";
  return "This browser cannot show " + name + ". It is damaged, or of a kind that --embed would convert.";
}
function fit(node, width, height) {
  node.classList.toggle("crisp", Math.max(width, height) <= 128);  // small ones are shown pixel by pixel
  const shape = Math.min(16 / 9, Math.max(3 / 4, width / height));
  if (!at("tiles").style.getPropertyValue("--shape")) at("tiles").style.setProperty("--shape", shape);  // the first one's, for all
}
function picture(item) {
  const image = make("img", {alt: item.prompt || item.sample, loading: "lazy", src: item.src});
  image.addEventListener("load", () => fit(image, image.naturalWidth, image.naturalHeight));
  const stage = make("button", {type: "button", className: "stage", ariaLabel: "Enlarge: " + (item.prompt || item.sample)}, image);
  image.addEventListener("error", () => note(stage, unplayable(item)));
  stage.addEventListener("click", () => show(item));
  return stage;
}
const near = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting) target.preload = "metadata";
    else target.pause();
    if (isIntersecting && at("all").ariaPressed === "true") start(target);
  }
}, {rootMargin: "150px"});
function clip(item) {
  const name = item.prompt || item.sample;
  const video = make("video", {muted: true, loop: true, playsInline: true, preload: "none", ariaLabel: name, src: item.src});
  if (item.poster) video.poster = item.poster;
  const seconds = make("span", {className: "seconds", hidden: true});
  const stage = make("div", {className: "stage"}, video, seconds);
  playable(stage, video, name, () => at("all").ariaPressed === "true");
  video.addEventListener("loadedmetadata", () => {
    fit(video, video.videoWidth, video.videoHeight);
    seconds.hidden = !Number.isFinite(video.duration);
    seconds.textContent = video.duration.toFixed(1) + " s";
  });
  video.addEventListener("error", () => { if (video.hasAttribute("src")) note(stage, unplayable(item)); });
  near.observe(video);
  return stage;
}
function stage(item) {
  if (item.fault) {
    const empty = make("div", {className: "stage"});
    note(empty, item.fault);
    return empty;
  }
  return item.clip ? clip(item) : picture(item);
}
function lines(item) {
  const sorted = Number(at("sort").value), list = make("dl", {className: "scores"});
  const chosen = scores.map((_, i) => i).filter(i => item.scores[i] !== null || item.reasons[i]);
  const first = chosen.filter(i => i === sorted).concat(chosen.filter(i => i !== sorted)).slice(0, 6);
  for (const i of first) {
    const classes = [i === sorted ? "now" : "", item.reasons[i] ? "bad" : ""].join(" ").trim();
    const value = item.reasons[i] ? item.reasons[i].split(":")[0] : figure(item.scores[i]);
    list.append(make("dt", {className: classes, textContent: scores[i].label}), make("dd", {className: classes, textContent: value, title: item.reasons[i] || ""}));
  }
  return list;
}
function tile(item) {
  const many = at("model").options.length > 2;
  const known = [item.seed === null ? item.sample : "seed " + item.seed, many ? item.model : ""].filter(Boolean).join(" \u00b7 ");
  const more = make("button", {type: "button", textContent: "Details", ariaLabel: "Details of " + item.sample});
  more.addEventListener("click", () => show(item));
  const node = make("li", {className: item.clip ? "tile clip" : "tile"},
    stage(item),
    make("p", {className: "prompt", dir: "auto", title: item.prompt, textContent: item.prompt || item.sample}),
    lines(item),
    make("div", {className: "under"}, make("span", {textContent: known}), more));
  node.dataset.sample = item.sample;
  return node;
}
function draw() {
  for (const video of document.querySelectorAll("#tiles video")) {  // a player that is gone frees its decoder
    near.unobserve(video);
    video.removeAttribute("src");
    video.load();
  }
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1), from = page * PAGE;
  const shown = found.slice(from, from + PAGE);
  at("tiles").replaceChildren(...shown.map(tile));
  at("none").hidden = found.length > 0;
  const all = found.length.toLocaleString("en") + (found.length < items.length ? " (of " + items.length.toLocaleString("en") + ")" : "");
  at("count").textContent = found.length ? (from + 1).toLocaleString("en") + "\u2013" + (from + shown.length).toLocaleString("en") + " of " + all : "0 of " + items.length.toLocaleString("en");
  at("back").disabled = page === 0;
  at("on").disabled = page >= last;
}

// ---- one item, large
function show(item) {
  const box = at("details"), large = box.querySelector(".large");
  at("details-name").textContent = [item.sample, item.model].filter(Boolean).join(" \u00b7 ");
  box.querySelector(".whole").textContent = item.prompt;
  if (item.fault) note(large, item.fault);
  else if (item.clip) large.replaceChildren(make("video", {src: item.src, controls: true, loop: true, muted: true, playsInline: true, autoplay: !still.matches, ariaLabel: item.prompt || item.sample}));
  else large.replaceChildren(make("img", {src: item.src, alt: item.prompt || item.sample}));
  const media = large.firstChild;
  media.addEventListener("load", () => fit(media, media.naturalWidth, media.naturalHeight));
  media.addEventListener("loadedmetadata", () => fit(media, media.videoWidth, media.videoHeight));
  const rows = item.seed === null ? [] : [["seed", String(item.seed)]];
  scores.forEach((score, i) => {
    if (item.reasons[i]) rows.push([score.label, item.reasons[i]]);
    else if (item.scores[i] !== null) rows.push([score.label + (score.lower ? " (lower is better)" : ""), String(item.scores[i])]);
  });
  const body = box.querySelector("tbody");
  body.replaceChildren(...[...rows, ...item.notes].map(([name, value]) =>
    make("tr", {}, make("th", {scope: "row", textContent: name}), make("td", {textContent: value}))));
  if (item.file) {
    const link = make("a", {href: item.file, target: "_blank", rel: "noopener", textContent: decodeURIComponent(item.file)});
    body.append(make("tr", {}, make("th", {scope: "row", textContent: "file"}), make("td", {}, link)));
  }
  box.showModal();
}
at("details").addEventListener("close", () => at("details").querySelector(".large").replaceChildren());
at("details").addEventListener("click", event => { if (event.target === at("details")) at("details").close(); });

// ---- controls
function point() {
  at("direction").textContent = down ? "\u2193" : "\u2191";
  at("direction").ariaLabel = down ? "Descending; change to ascending" : "Ascending; change to descending";
}
at("sort").addEventListener("change", () => {
  const score = scores[Number(at("sort").value)];
  down = Boolean(score) && !score.lower;  // the best first
  if (score) at("ranged").value = at("sort").value;
  point();
  arrange();
});
at("direction").addEventListener("click", () => { down = !down; point(); arrange(); });
let typing;
for (const id of ["text", "low", "high"]) at(id).addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(arrange, 120); });
for (const id of ["model", "status", "ranged"]) at(id).addEventListener("change", arrange);
at("reset").addEventListener("click", () => {
  for (const id of ["text", "low", "high"]) at(id).value = "";
  for (const id of ["model", "status", "sort"]) at(id).selectedIndex = 0;
  down = false;
  point();
  arrange();
});
function turn(by) {
  page += by;
  draw();
  scrollTo({top: 0});
}
at("back").addEventListener("click", () => turn(-1));
at("on").addEventListener("click", () => turn(1));
at("all").addEventListener("click", () => {
  const playing = at("all").ariaPressed !== "true";
  at("all").ariaPressed = String(playing);
  at("all").textContent = playing ? "Pause all" : "Play all";
  for (const video of document.querySelectorAll("#tiles video")) {
    const {top, bottom} = video.getBoundingClientRect();
    if (!playing) video.pause();
    else if (bottom > 0 && top < innerHeight) start(video);
  }
});
arrange();
