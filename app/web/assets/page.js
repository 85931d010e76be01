// Refreshes a page: #live is replaced by what the server renders, events of one job are appended as they come.
"use strict";

const REFRESH_MS = 2000;
const TERMINAL = ["job.succeeded", "job.failed", "job.cancelled"];
const main = document.querySelector("main");
let timer = null;

async function refresh() {
  timer = null;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.ok) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const live = fresh.querySelector("#live");
      if (live) document.querySelector("#live").replaceWith(live);
      main.dataset.busy = fresh.querySelector("main").dataset.busy;
    }
  } catch {
    // The service does not answer; the next refresh tries again.
  }
  if (main.dataset.busy === "yes") refreshLater();
}

function refreshLater() {
  if (timer === null && !document.hidden) timer = setTimeout(refresh, REFRESH_MS);
}

function appendEvent(list, event) {
  const seen = Number(list.dataset.last);
  if (event.seq <= seen) return;
  list.dataset.last = event.seq;
  const item = document.createElement("li");
  const time = document.createElement("span");
  time.className = "soft";
  time.textContent = event.at.slice(11, 19) + " ";
  item.append(time, event.message);
  list.append(item);
  list.scrollTop = list.scrollHeight;
}

function followEvents(list) {
  const source = new EventSource(list.dataset.events + "?after=" + list.dataset.last);
  const types = list.dataset.types.split(" ");
  for (const type of types) {
    source.addEventListener(type, (message) => {
      appendEvent(list, JSON.parse(message.data));
      if (TERMINAL.includes(type)) source.close();
      refreshLater();
    });
  }
}

const list = document.querySelector("ol.events");
if (list && main.dataset.busy === "yes") followEvents(list);
if (main.dataset.busy === "yes") refreshLater();
document.addEventListener("visibilitychange", () => {
  if (main.dataset.busy === "yes") refreshLater();
});
