"use strict";
// The text of a mark is shown at the nearest one to the pointer, by touch as well; without a script the browser does it.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);
for (const title of document.querySelectorAll(".plot title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
const middle = (mark) => {
  const box = mark.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};
const show = (mark) => {
  const [x, y] = middle(mark);
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const left = Math.min(Math.max(x - tip.offsetWidth / 2, 4), document.documentElement.clientWidth - tip.offsetWidth - 4);
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${y + scrollY - tip.offsetHeight - 12}px`;
};
const hide = () => { tip.hidden = true; };
for (const plot of document.querySelectorAll(".plot")) {
  const near = (event) => {
    const marks = [...plot.querySelectorAll("[data-tip]")].map((mark) => {
      const [x, y] = middle(mark);
      const across = mark.tagName === "rect" ? 2 : 1; // a bar is found above and below its middle, too
      return [Math.hypot((x - event.clientX) * across, mark.tagName === "rect" ? 0 : y - event.clientY), mark];
    });
    const [far, mark] = marks.reduce((one, other) => (other[0] < one[0] ? other : one), [24, null]);
    if (mark) show(mark); else hide();
  };
  plot.addEventListener("pointermove", near);
  plot.addEventListener("pointerdown", near);
  plot.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, { passive: true });
// A trial's button shows its point as the mouse would.
for (const button of document.querySelectorAll("button[data-point]")) {
  const point = () => [...document.querySelectorAll(`.scales [data-number="${button.dataset.point}"]`)]
    .find((mark) => mark.getClientRects().length);
  const told = () => { const mark = point(); if (mark) show(mark); };
  button.addEventListener("focus", told);
  button.addEventListener("click", () => {
    const mark = point();
    if (mark) mark.closest("figure").scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => requestAnimationFrame(told));
  });
  button.addEventListener("blur", hide);
}
const slider = document.getElementById("layer");
if (slider) {
  document.querySelectorAll(".scripted").forEach((one) => { one.hidden = false; });
  slider.addEventListener("input", () => {
    document.querySelectorAll(".layer").forEach((one, layer) => { one.hidden = layer !== Number(slider.value); });
    document.getElementById("layer-shown").textContent = slider.value;
  });
}
