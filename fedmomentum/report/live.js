// Keeps the page current during the run; without it the page is complete as it came.
"use strict";

const SILENCE_SECONDS = 45; // the server sends something at least every 15 seconds
const RETRY_SECONDS = 10;
const connection = document.getElementById("connection");
const spoken = document.getElementById("spoken");
let source = null;
let heardAt = Date.now();
let clockDifference = 0; // seconds that the server's clock is ahead of this machine's
let hasEnded = false;

function time(date) {
  return date.toLocaleTimeString(undefined, { hour12: false });
}

function tell(state, text) {
  connection.dataset.state = state;
  if (connection.textContent !== text) connection.textContent = text;
}

// ── what the server sends ──

function show(update) {
  clockDifference = update.now - Date.now() / 1000;
  for (const [name, html] of Object.entries(update.parts)) {
    const part = document.getElementById(name);
    if (part === null || !("part" in part.dataset)) continue;
    // A log that was scrolled to its end stays there.
    const isAtEnd = part.scrollTop + part.clientHeight >= part.scrollHeight - 4;
    part.innerHTML = html; // escaped by the server; the page's policy lets no script in it run
    const section = part.closest("section");
    if (section !== null) section.hidden = html === "";
    if (name === "log" && isAtEnd) part.scrollTop = part.scrollHeight;
  }
  // Screen readers announce rounds and the end, not every second.
  if (update.spoken && spoken.textContent !== update.spoken) spoken.textContent = update.spoken;
  document.title = update.title;
  countDown();
}

function hear() {
  heardAt = Date.now();
  if (!hasEnded) tell("open", "Live. Updated " + time(new Date()));
}

function lose(reason) {
  if (hasEnded) return;
  tell("lost", reason + " Shown is what was known at " + time(new Date(heardAt)) + ". Trying again.");
}

function open() {
  source = new EventSource("/events");
  source.addEventListener("update", (event) => { show(JSON.parse(event.data)); hear(); });
  source.addEventListener("tick", hear);
  source.addEventListener("end", () => {
    hasEnded = true;
    source.close();
    tell("still", "The run has ended; this page stays as it is. Last update " + time(new Date()));
  });
  source.onerror = () => {
    const wasRefused = source.readyState === EventSource.CLOSED;
    lose(wasRefused ? "The server refuses the connection: too many are watching, or the address printed by the terminal has to be opened again."
      : "There is no connection: the run or its machine has stopped, or the network is down.");
    if (wasRefused) setTimeout(open, RETRY_SECONDS * 1000);
  };
}

// ── deadlines ──

function countDown() {
  const now = Date.now() / 1000 + clockDifference;
  for (const element of document.querySelectorAll("time[data-until]")) {
    const left = Math.round(Number(element.dataset.until) - now);
    const text = left >= 0 ? span(left) + " left" : "late by " + span(-left);
    if (element.textContent !== text) element.textContent = text;
    element.toggleAttribute("data-late", left < 0);
  }
}

function span(seconds) {
  if (seconds < 60) return seconds + " s";
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return minutes + " min " + String(seconds % 60).padStart(2, "0") + " s";
  return Math.floor(minutes / 60) + " h " + String(minutes % 60).padStart(2, "0") + " min";
}

const log = document.getElementById("log");
log.scrollTop = log.scrollHeight;
setInterval(() => {
  if (!hasEnded) countDown();
  if (!hasEnded && Date.now() - heardAt > SILENCE_SECONDS * 1000) lose("Nothing comes from the server.");
}, 1000);
open();
