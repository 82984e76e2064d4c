import { RATE_HZ } from "./pcm.js";
import { Playlist } from "./playlist.js";

const PIECE = 1024; // samples: 43 ms

/**
 * What plays, as {node, port, heldS}: heldS, seconds of sound that it has taken and not let out.
 *
 * context: running at 24 kHz. Browsers give a page that came by plain http no audio thread.
 */
export async function outlet(context) {
  return context.audioWorklet ? inAudioThread(context) : inThePage(context);
}

async function inAudioThread(context) {
  await context.audioWorklet.addModule("/page/player-worklet.js");
  const options = { numberOfInputs: 0, outputChannelCount: [1] };
  const node = new AudioWorkletNode(context, "player", options);
  return { node, port: node.port, heldS: 0 };
}

// Deprecated, and the only other way to play what comes piece by piece without a gap.
function inThePage(context) {
  const { port1, port2 } = new MessageChannel();
  const playlist = new Playlist(port2);
  const node = context.createScriptProcessor(PIECE, 0, 1);
  node.onaudioprocess = ({ outputBuffer }) => {
    const out = outputBuffer.getChannelData(0);
    out.fill(0);
    playlist.fill(out);
  };
  return { node, port: port1, heldS: (2 * PIECE) / RATE_HZ };
}
