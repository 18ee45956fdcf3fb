"use strict";
// A trial's button shows its point as the mouse would.
for (const button of document.querySelectorAll("button[data-point]")) {
  const show = () => Plotly.Fx.hover("chart-front", [{ curveNumber: 0, pointNumber: Number(button.dataset.point) }]);
  button.addEventListener("focus", show);
  button.addEventListener("click", () => {
    show();
    document.getElementById("chart-front").scrollIntoView({ block: "nearest" });
  });
  button.addEventListener("blur", () => Plotly.Fx.unhover("chart-front"));
}
const slider = document.getElementById("layer");
if (slider) {
  slider.addEventListener("input", () => {
    const layer = Number(slider.value);
    const traces = document.getElementById("chart-points").data.length;
    const visible = Array.from({ length: traces }, (_, trace) => Math.floor(trace / 2) === layer);
    Plotly.restyle("chart-points", { visible });
    document.getElementById("layer-shown").textContent = String(layer);
  });
}
// Where a page is printed or a section unfolded, charts take the width that there is.
addEventListener("beforeprint", () => document.querySelectorAll(".js-plotly-plot").forEach((c) => Plotly.Plots.resize(c)));
