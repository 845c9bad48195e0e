// A comfort, not a need: response times measured where they arise, keys for answers. Without it, forms do the same.
"use strict";
(() => {
  const form = document.querySelector("form.answer");
  if (!form) return;
  const pictures = [...form.querySelectorAll("img")];
  const buttons = [...form.querySelectorAll("button")];
  let appeared = null;
  let sent = false;

  // All pictures appear at once, whichever came first.
  form.classList.add("waiting");
  const appear = () => {
    if (appeared !== null) return;
    form.classList.remove("waiting");
    requestAnimationFrame(() => { appeared = performance.now(); form.dataset.appeared = ""; });
  };
  Promise.all(pictures.map((picture) => picture.decode().catch(() => undefined))).then(appear);
  setTimeout(appear, 8000);

  form.addEventListener("submit", (event) => {
    if (sent || appeared === null) { event.preventDefault(); return; }
    sent = true;
    form.elements.ms.value = String(Math.round(performance.now() - appeared));
    form.classList.add("sending");
  });
  // Back from the next page: the form is as new, the server keeps the first answer.
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  const answer = (index) => {
    if (buttons[index] && appeared !== null && !sent) form.requestSubmit(buttons[index]);
  };
  addEventListener("keydown", (event) => {
    if (event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (form.dataset.keys === "sides") {
      if (event.key === "ArrowLeft") answer(0);
      if (event.key === "ArrowRight") answer(1);
    } else if (/^[1-9]$/.test(event.key)) answer(Number(event.key) - 1);
  });
})();
