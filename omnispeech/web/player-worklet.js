import { Playlist } from "./playlist.js";

class PlayerProcessor extends AudioWorkletProcessor {
  #playlist = new Playlist(this.port);

  process(_inputs, [[out]]) {
    this.#playlist.fill(out);
    return true;
  }
}

registerProcessor("player", PlayerProcessor);
