// What both gradient shaders share: the score of a pair and its weight, from a given log-sum-exp.

layout(binding = 0) readonly buffer Query { STORED query[]; };
layout(binding = 1) readonly buffer Key { STORED keys[]; };
layout(binding = 2) readonly buffer Value { STORED values[]; };
layout(binding = 3) readonly buffer Mask { float mask[]; };
layout(binding = 4) readonly buffer Index { int range_index[]; };
layout(binding = 5) readonly buffer Bounds { ivec2 ranges[]; };
layout(binding = 6) readonly buffer GradOut { STORED grad_out[]; };
layout(binding = 7) readonly buffer Lse { float lse[]; };

const int OWN = (QUADS + THREADS - 1) / THREADS;  // float4 of a result per invocation

shared float weights[THREADS];
shared float changes[THREADS];

// Gives the pair's weight, and sets the factor from the weight's to the raw score's gradient.
float weight_of(int row, int key, int masked, out float slope) {
  vec4 sum = vec4(0.0);
  for (int d = 0; d < QUADS; d++) sum = fma(wide(query[row * QUADS + d]), wide(keys[key * QUADS + d]), sum);
  float s = (sum.x + sum.y + sum.z + sum.w) * p.scale;
  slope = p.scale;
  if (p.softcap > 0.0) {
    const float t = bounded_tanh(s / p.softcap);
    s = p.softcap * t;
    slope *= 1.0 - t * t;
  }
  if (p.has_mask != 0) s += mask[masked];
  const float whole = lse[row];
  return whole == -INFINITE || s == -INFINITE ? 0.0 : exp(s - whole);
}

float grad_of_weight(int row, int key) {
  vec4 sum = vec4(0.0);
  for (int d = 0; d < QUADS; d++) sum = fma(wide(grad_out[row * QUADS + d]), wide(values[key * QUADS + d]), sum);
  return sum.x + sum.y + sum.z + sum.w;
}
