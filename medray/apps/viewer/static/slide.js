// One slide in depth: Leaflet pans and zooms; tiles come from the slide and the run.
"use strict";
const $ = (id) => document.getElementById(id);
const name = new URLSearchParams(location.search).get("slide") || "";
const asked = "slide=" + encodeURIComponent(name);
const hiddenValues = { classes: new Set(), kinds: new Set() };
let slide, map, unit, base, overlay, truth, worst, frame, worstAt = -1;

async function fetched(url) {
  const answer = await fetch(url), told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function fail(said) {
  $("problem").hidden = false;
  $("problem").textContent = said;
}

// Leaflet's y points up; here a unit is a pixel of level 0, from the upper left corner.
const point = (y, x) => L.latLng(-y / unit, x / unit);
const whole = () => L.latLngBounds(point(0, 0), point(slide.height, slide.width));

function layer(kind, shown, options) {
  const url = `/tile/${kind}/{z}/{y}/{x}?${asked}&v=${slide.version}` + (shown ? "&shown=" + shown : "");
  const made = L.tileLayer(url, { tileSize: 256, noWrap: true, bounds: whole(), maxNativeZoom: slide.last_zoom, maxZoom: slide.last_zoom + 4, keepBuffer: 3, ...options });
  // A tile that does not come says why, once.
  made.once("tileerror", (event) => fetch(event.tile.src).then((answer) => answer.json()).then((told) => fail(told.error)).catch(() => fail("medray view does not answer any more")));
  made.on("tileload", (event) => event.tile.classList.toggle("coarse", map.getZoom() > slide.last_zoom));
  return made;
}

const current = () => document.querySelector("input[name=layer]:checked").value;
const group = () => (current() === "difference" ? "kinds" : "classes");

function values(of) {
  if (of === "classes" && current() === "uncertainty") return "0"; // it has no classes
  return slide[of].map((one) => one.value).filter((value) => !hiddenValues[of].has(value)).join(",");
}

function draw() {
  for (const old of [overlay, truth]) if (old) map.removeLayer(old);
  overlay = truth = null;
  const opacity = $("opacity").value / 100, kind = current();
  if (kind && values(group())) overlay = layer(kind, values(group()), { opacity, className: "overlay", zIndex: 2 }).addTo(map);
  const shown = slide.classes.map((one) => one.value).filter((value) => !hiddenValues.classes.has(value)).join(",");
  if ($("truth").checked && shown) truth = layer("truth", shown + (kind === "difference" ? "&dark=1" : ""), { className: "overlay", zIndex: 3 }).addTo(map);
}

function legend() {
  const of = group();
  $("legend").hidden = (!current() && !$("truth").checked) || current() === "uncertainty";
  $("toggles").replaceChildren(...slide[of].map((one) => {
    const label = document.createElement("label"), box = document.createElement("input"), swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    box.type = "checkbox";
    box.checked = !hiddenValues[of].has(one.value);
    box.dataset.value = one.value;
    box.addEventListener("change", () => { hiddenValues[of][box.checked ? "delete" : "add"](one.value); draw(); });
    swatch.classList.add("swatch");
    swatch.setAttribute("style", "");
    swatch.style.background = one.color;
    label.append(box, swatch, one.name);
    return label;
  }));
}

function choose(kind) {
  const radio = document.querySelector(`input[name=layer][value="${kind}"]`);
  if (radio.disabled) return;
  radio.checked = true;
  legend();
  draw();
}

function setOpacity(percent) {
  $("opacity").value = percent;
  $("percent").textContent = $("opacity").value + " %";
  if (overlay) overlay.setOpacity($("opacity").value / 100);
}

async function goWorst(step) {
  try {
    worst = worst || await fetched("/api/worst?" + asked);
  } catch (error) {
    fail(error.message);
    return;
  }
  if (!worst.length) {
    $("said").textContent = slide.layers.truth ? "Nothing is wrong on this slide." : "Everything is certain on this slide.";
    return;
  }
  worstAt = (worstAt + step + worst.length) % worst.length;
  const one = worst[worstAt];
  const bounds = L.latLngBounds(point(one.y, one.x), point(one.y + one.height, one.x + one.width));
  if (frame) map.removeLayer(frame);
  frame = L.rectangle(bounds, { color: "#0b5c8a", weight: 2, fill: false, interactive: false }).addTo(map);
  map.fitBounds(bounds, { maxZoom: slide.last_zoom, animate: false });
  const what = "wrong" in one ? `worst: ${(100 * one.wrong).toFixed(0)} % of its pixels are wrong` : `least certain: uncertainty ${one.uncertain.toFixed(2)} on average`;
  $("said").textContent = `Region ${worstAt + 1} of the ${worst.length} ${what}.`;
}

function goSlide(step) {
  let order = [];
  try { order = JSON.parse(sessionStorage.getItem("order")) || []; } catch { /* none was kept */ }
  const at = order.indexOf(name), next = order[at + step];
  if (at >= 0 && next !== undefined) location.href = "/slide?slide=" + encodeURIComponent(next);
  else $("said").textContent = at < 0 ? "Open a slide from the gallery to go on to the next." : "There is no further slide.";
}

// --- scale and address ---------------------------------------------------------------

function scaleBar() {
  const control = L.control({ position: "bottomleft" });
  control.onAdd = () => {
    const box = L.DomUtil.create("div", "scale"), text = document.createElement("span"), bar = document.createElement("i");
    box.append(text, bar);
    const update = () => {
      const perPixel = unit / 2 ** map.getZoom() * (slide.mpp || 1), most = 140 * perPixel;
      const power = 10 ** Math.floor(Math.log10(most)), length = [5, 2, 1].map((n) => n * power).find((n) => n <= most);
      bar.style.width = length / perPixel + "px";
      text.textContent = !slide.mpp ? length + " px" : length >= 1000 ? length / 1000 + " mm" : length + " µm";
    };
    map.on("zoomend", update);
    update();
    return box;
  };
  return control;
}

function fromAddress() {
  const [zoom, y, x] = location.hash.slice(1).split("/").map(Number);
  if ([zoom, y, x].every(Number.isFinite) && location.hash.length > 1) map.setView(point(y, x), zoom, { animate: false });
  else map.fitBounds(whole(), { animate: false });
}

function toAddress() {
  const middle = map.getCenter();
  history.replaceState(null, "", `#${map.getZoom()}/${Math.round(-middle.lat * unit)}/${Math.round(middle.lng * unit)}`);
}

// --- start ---------------------------------------------------------------------------

function describe() {
  document.title = slide.slide + " – " + slide.run;
  $("title").textContent = slide.slide;
  $("status").textContent = slide.status;
  $("status").classList.add(slide.status);
  $("f1").textContent = slide.f1 === null ? "" : "F1 " + slide.f1.toFixed(3);
  if (slide.problem) fail(slide.problem);
  else if (slide.status === "failed") fail(slide.message);
  $("said").textContent = slide.note || (slide.status === "failed" ? "" : slide.message);
  for (const radio of document.querySelectorAll("input[name=layer]")) radio.disabled = Boolean(radio.value) && !slide.layers[radio.value];
  $("truth").disabled = !slide.layers.truth;
  $("worst").disabled = !slide.layers.difference && !slide.layers.uncertainty;
  if (!slide.layers.truth) $("truth").parentElement.title = "There is no truth of this slide; give --report or --truth";
  if ($("worst").disabled) $("worst").title = "There is no truth of this slide, and no uncertainty; give --truth, or infer with --quality";
  if (!slide.layers.uncertainty) document.querySelector("input[value=uncertainty]").parentElement.title = "The run kept no uncertainty; infer with --quality";
  if (!slide.layers.probability) document.querySelector("input[value=probability]").parentElement.title = "The run kept no probabilities; infer with --probabilities";
  for (const [key, value] of Object.entries(slide.facts)) {
    if (!value) continue;
    $("facts").append(Object.assign(document.createElement("dt"), { textContent: key }), Object.assign(document.createElement("dd"), { textContent: value }));
  }
}

async function start() {
  slide = await fetched("/api/slide?" + asked);
  describe();
  unit = 2 ** slide.last_zoom;
  map = L.map("map", { crs: L.CRS.Simple, attributionControl: false, minZoom: 0, maxZoom: slide.last_zoom + 4, zoomSnap: .25, maxBoundsViscosity: .8, fadeAnimation: false });
  map.on("zoomend", () => $("map").classList.toggle("between", !Number.isInteger(map.getZoom())));
  map.setMaxBounds(whole().pad(.6));
  fromAddress();
  if (slide.layers.slide) base = layer("slide", "", { zIndex: 1 }).addTo(map);
  scaleBar().addTo(map);
  map.on("moveend", toAddress);
  choose(slide.layers.mask ? "mask" : "");
  document.body.dataset.ready = "yes";
}

document.querySelectorAll("input[name=layer]").forEach((radio) => radio.addEventListener("change", () => { legend(); draw(); }));
$("truth").addEventListener("change", () => { legend(); draw(); });
$("opacity").addEventListener("input", () => setOpacity($("opacity").value));
$("worst").addEventListener("click", () => goWorst(1));
$("fit").addEventListener("click", () => map.fitBounds(whole()));
$("before").addEventListener("click", () => goSlide(-1));
$("after").addEventListener("click", () => goSlide(1));
$("help-open").addEventListener("click", () => $("help").showModal());
window.addEventListener("hashchange", fromAddress);

const KEYS = {
  1: () => choose("mask"), 2: () => choose("probability"), 3: () => choose("difference"), 4: () => choose("uncertainty"), 0: () => choose(""),
  t: () => { if (!$("truth").disabled) $("truth").click(); },
  h: () => document.body.classList.toggle("hidden-overlays"),
  "[": () => setOpacity(Number($("opacity").value) - 10), "]": () => setOpacity(Number($("opacity").value) + 10),
  w: () => { if (!$("worst").disabled) goWorst(1); }, W: () => { if (!$("worst").disabled) goWorst(-1); },
  f: () => map.fitBounds(whole()), n: () => goSlide(1), p: () => goSlide(-1),
  g: () => { location.href = $("back").href; }, "?": () => $("help").showModal(),
  "+": () => map.zoomIn(), "=": () => map.zoomIn(), "-": () => map.zoomOut(),
  ArrowLeft: () => map.panBy([-120, 0]), ArrowRight: () => map.panBy([120, 0]), ArrowUp: () => map.panBy([0, -120]), ArrowDown: () => map.panBy([0, 120]),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !map || $("help").open) return;
  // Leaflet has the same keys once the map has the focus; a slider has its own.
  const own = event.target.matches("input[type=range], input[type=radio]") && event.key.startsWith("Arrow");
  if (own || event.target.closest("#map") && /^(Arrow|[-+=])/.test(event.key)) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});
start().catch((error) => fail(error.message));
