// Optional improvements: progress updates without a reload, and arrow keys move in galleries and between examples.
"use strict";

const INTERVAL_MS = 5000;
let updated = new Date();

async function update() {
  const parts = document.querySelectorAll("[data-live]");
  if (!parts.length) return;
  const response = await fetch(location.href, {credentials: "same-origin"});
  if (!response.ok) throw new Error(response.statusText);
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const part of parts) {
    const now = page.getElementById(part.id);
    if (!now) return location.reload();  // another kind of page, such as the gallery once scores are there
    if (now.innerHTML === part.innerHTML) continue;
    const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    part.replaceChildren(...now.childNodes);
    if (focused) part.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus();
  }
  updated = new Date();
}

async function watch() {
  const stale = document.getElementById("stale");
  if (!document.hidden) {
    stale.hidden = await update().then(() => true, () => false);
    stale.textContent = stale.hidden ? "" : `Not updated since ${updated.toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"})}.`;
  }
  setTimeout(watch, INTERVAL_MS);
}

setTimeout(watch, INTERVAL_MS);

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[event.key];
  const focused = document.activeElement;
  if (!step || focused.matches("input, select, textarea")) return;
  const across = event.key === "ArrowLeft" || event.key === "ArrowRight";
  const grid = focused.closest(".grid");
  if (grid) {
    const links = [...grid.querySelectorAll("a")];
    const columns = links.filter((link) => link.offsetTop === links[0].offsetTop).length;
    const next = links[links.indexOf(focused) + step * (across ? 1 : columns)];
    if (next) {
      next.focus();
      event.preventDefault();
    }
  } else if (across && (focused.matches("body, main") || focused.closest(".pager"))) {
    document.querySelector(`a[rel="${step < 0 ? "prev" : "next"}"]`)?.click();
  }
});
