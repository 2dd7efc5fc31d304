// All slides of the run: filtered, sorted, and opened.
"use strict";
const $ = (id) => document.getElementById(id);
const FIELDS = ["text", "status", "from", "to", "sort"];
let run = { slides: [] }, before = "";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function card(slide) {
  const link = make("a", "card");
  link.href = "/slide?slide=" + encodeURIComponent(slide.slide);
  link.title = slide.slide;
  const picture = make("span", "picture");
  const image = make("img");
  image.loading = "lazy";
  image.alt = "";
  image.onerror = () => picture.replaceChildren(slide.status === "under way" ? "under way" : "the slide cannot be read");
  image.src = "/thumbnail?slide=" + encodeURIComponent(slide.slide) + "&v=" + slide.version;
  picture.append(image);
  const text = make("div", "text"), row = make("div", "row");
  row.append(make("span", "pill " + slide.status, slide.status));
  if (slide.f1 !== null) row.append(make("span", "", "F1 " + slide.f1.toFixed(3)));
  else if (slide.area !== null) row.append(make("span", "soft", (100 * slide.area).toFixed(1) + " % marked"));
  text.append(make("b", "", slide.slide), row);
  if (slide.message || slide.note) text.append(make("small", "", slide.message || slide.note));
  link.append(picture, text);
  return link;
}

const last = (value, sign) => (value === null ? Infinity : sign * value);
const ORDERS = {
  name: () => 0,
  f1: (a, b) => last(a.f1, 1) - last(b.f1, 1) || 0,
  best: (a, b) => last(a.f1, -1) - last(b.f1, -1) || 0,
  area: (a, b) => last(a.area, -1) - last(b.area, -1) || 0,
  status: (a, b) => b.status.localeCompare(a.status),
};

function chosen() {
  const said = Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()]));
  const from = said.from === "" ? -1 : Number(said.from), to = said.to === "" ? 2 : Number(said.to);
  const found = run.slides.filter((slide) =>
    slide.slide.toLowerCase().includes(said.text.toLowerCase()) &&
    (!said.status || slide.status === said.status) &&
    ((said.from === "" && said.to === "") || (slide.f1 !== null && slide.f1 >= from && slide.f1 <= to)));
  const byName = (a, b) => a.slide.localeCompare(b.slide, "en", { numeric: true });
  return found.sort((a, b) => ORDERS[said.sort](a, b) || byName(a, b));
}

function show() {
  const found = chosen();
  $("cards").replaceChildren(...found.map(card));
  $("count").textContent = found.length === run.slides.length ? "" : found.length + " of " + run.slides.length + " slides";
  if (run.slides.length && !found.length) $("count").textContent = "No slide is like that.";
  // The slide's page goes on in this order.
  sessionStorage.setItem("order", JSON.stringify(found.map((slide) => slide.slide)));
  const query = new URLSearchParams(FIELDS.map((name) => [name, $(name).value]).filter(([name, value]) => value && !(name === "sort" && value === "name")));
  history.replaceState(null, "", query.size ? "?" + query : "/");
}

async function read() {
  const answer = await fetch("/api/run"), text = await answer.text(), told = JSON.parse(text);
  if (!answer.ok) throw new Error(told.error);
  // A run that goes on is looked at again; what did not change is left as it stands.
  if (told.slides.some((slide) => slide.status === "under way")) setTimeout(() => read().catch(fail), 10000);
  if (text === before) return;
  before = text;
  run = told;
  document.title = run.run + " – medray view";
  $("title").textContent = run.run;
  const counts = {};
  for (const slide of run.slides) counts[slide.status] = (counts[slide.status] || 0) + 1;
  const words = Object.entries(counts).map(([status, n]) => n + " " + status).join(", ");
  $("summary").textContent = (run.slides.length ? run.slides.length + (run.slides.length === 1 ? " slide: " : " slides: ") + words : "no slides yet") + " · model " + run.model;
  $("report").hidden = !run.report;
  const scored = run.slides.some((slide) => slide.f1 !== null);
  document.querySelectorAll(".scored").forEach((label) => { label.hidden = !scored; });
  for (const value of ["f1", "best"]) document.querySelector(`#sort option[value=${value}]`).disabled = !scored;
  show();
}

function fail(error) {
  $("problem").hidden = false;
  $("problem").textContent = error.message;
}

for (const [name, value] of new URLSearchParams(location.search)) if (FIELDS.includes(name)) $(name).value = value;
$("filters").addEventListener("input", show);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("help-open").addEventListener("click", () => $("help").showModal());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target.matches("input, select");
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing) return;
  if (event.key === "?") $("help").showModal();
  if (event.key === "/") { event.preventDefault(); $("text").focus(); }
  const cards = [...$("cards").children];
  if (!event.key.startsWith("Arrow") || !cards.length) return;
  event.preventDefault();
  const columns = Math.max(1, cards.filter((one) => one.offsetTop === cards[0].offsetTop).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const at = cards.indexOf(document.activeElement);
  cards[at < 0 ? 0 : Math.min(cards.length - 1, Math.max(0, at + step))].focus();
});
read().catch(fail);
