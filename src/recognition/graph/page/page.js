
"use strict";
{
  const told = document.getElementById("details");
  const { elements } = JSON.parse(document.getElementById("data").textContent);
  const text = { "text-wrap": "wrap", "font-family": "system-ui, sans-serif", "font-size": 12 };
  const picture = cytoscape({
    container: document.getElementById("drawing"),
    elements,
    layout: { name: "preset", fit: true, padding: 30 },
    maxZoom: 3,
    style: [
      { selector: "node", style: { ...text, label: "data(label)" } },
      {
        selector: "node[back]",
        style: {
          "background-color": "data(back)", color: "data(front)", "border-width": 1,
          "border-color": "#333", shape: "round-rectangle", width: 190, height: 44,
          "text-valign": "center", "text-max-width": 400,
        },
      },
      { selector: "node[kind = 'device']", style: { shape: "rectangle", "border-style": "double", "border-width": 4 } },
      {
        selector: "node[kind = 'person']",
        style: { "background-color": "#f7f7f7", "border-color": "#777", "text-valign": "top", padding: 14 },
      },
      {
        selector: "edge",
        style: {
          ...text, "font-size": 9, label: "data(label)", width: 2, "line-color": "#555", color: "#111",
          "text-background-color": "#fff", "text-background-opacity": 0.85, "curve-style": "bezier",
          "target-arrow-color": "#333",
        },
      },
      {
        selector: "edge[bend]",
        style: { "curve-style": "unbundled-bezier", "control-point-distances": "data(bend)", "control-point-weights": 0.5 },
      },
      { selector: "edge[kind = 'alias']", style: { width: 5 } },
      { selector: "edge[kind = 'claims'], edge[kind = 'unlinked']", style: { "target-arrow-shape": "triangle" } },
      {
        selector: "edge[kind = 'refused'], edge[kind = 'unlinked']",
        style: { "line-style": "dashed", "line-color": "#a00000", "target-arrow-color": "#a00000" },
      },
      { selector: ":selected", style: { "border-width": 4, width: 4, "line-color": "#000" } },
    ],
  });
  picture.style().selector("node:selected").style({ width: 190, "border-color": "#000" }).update();
  // A long column is begun at its top, large enough to be read; the rest is a drag away.
  if (picture.zoom() < 0.6) {
    picture.zoom(0.8).center();
    picture.pan({ x: picture.pan().x, y: 60 });
  }
  picture.on("tap", "node[back], edge", (event) => { told.textContent = event.target.data("details"); });
  picture.on("tap", (event) => { if (event.target === picture) told.textContent = ""; });
  globalThis.picture = picture;
}
