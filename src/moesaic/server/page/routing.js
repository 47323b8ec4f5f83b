// The tokens of a streamed chunk with their experts and weights, from the fields that every client gets.

function decode(base64, kind) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  return new kind(bytes.buffer);
}

// [{text, experts, weights}], the latter two [layer][k]. A token's experts are those of the pass that chose it.
export function tokensOf(choice) {
  const texts = choice.logprobs?.content?.map(({ token }) => token) ?? choice.logprobs?.tokens ?? [];
  if (!choice.sgl_ext) return texts.map((text) => ({ text, experts: [], weights: [] }));
  const [rows, layers, width] = choice.sgl_ext.routed_shape;
  const experts = decode(choice.sgl_ext.routed_experts, Int32Array), weights = decode(choice.sgl_ext.routed_weights, Float32Array);
  // The first chunk begins with the tokens of the prompt.
  return texts.map((text, index) => {
    const row = rows - texts.length + index, token = { text, experts: [], weights: [] };
    for (let layer = 0; row >= 0 && layer < layers; layer += 1) {
      const from = (row * layers + layer) * width, chosen = experts.subarray(from, from + width);
      // -1 fills up where a token has fewer experts than others.
      const known = Array.from(chosen.keys()).filter((k) => chosen[k] >= 0);
      token.experts.push(known.map((k) => chosen[k]));
      token.weights.push(known.map((k) => weights[from + k]));
    }
    return token;
  });
}
