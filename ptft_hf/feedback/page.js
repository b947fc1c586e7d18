// Keys press the buttons that name them; without this file the buttons do all.
"use strict";
const box = document.getElementById("keys");
let on = localStorage.getItem("keys") !== "off";
let sent = false;
function show() {
  document.body.classList.toggle("keyed", on);
}
if (box) {
  // Whoever dictates, or has a screen reader's own keys, can turn ours off; the browser remembers it.
  box.checked = on;
  box.closest("p").hidden = false;
  box.addEventListener("change", () => {
    on = box.checked;
    localStorage.setItem("keys", on ? "on" : "off");
    show();
  });
}
show();
for (const prompt of document.querySelectorAll(".prompt")) prompt.scrollTop = prompt.scrollHeight; // what is asked
addEventListener("submit", () => { sent = true; });
addEventListener("pageshow", () => { sent = false; });
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox])");
  if (!on || sent || typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = [...document.querySelectorAll("[data-keys]")].find((b) => b.dataset.keys.split(" ").includes(key));
  if (button) {
    event.preventDefault();
    button.click();
  }
});
