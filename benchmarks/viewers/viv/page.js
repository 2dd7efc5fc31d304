// Shows an OME-Zarr with Viv, which Vizarr, Avivator and Vitessce draw with: each value
// in the grey of that value. `zoom` is minus the level, `target` [x, y] in its level 0.
import { Deck, OrthographicView } from "@deck.gl/core";
import { ColorPaletteExtension, MultiscaleImageLayer, loadOmeZarr } from "@hms-dbmi/viv";

window.show = async (source, zoom, target) => {
  const { data } = await loadOmeZarr(source, { type: "multiscales" });
  await new Promise((done, failed) => {
    new Deck({
      parent: document.body,
      views: new OrthographicView(),
      initialViewState: { zoom, target },
      useDevicePixels: false,
      onError: failed,
      layers: [
        new MultiscaleImageLayer({
          id: "mask",
          loader: data,
          selections: [{}],
          channelsVisible: [true],
          contrastLimits: [[0, 255]],
          colors: [[255, 255, 255]],
          extensions: [new ColorPaletteExtension()],
          onViewportLoad: done,
        }),
      ],
    });
  });
};
