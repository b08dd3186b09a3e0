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

// The score of a pair; sets the factor from the score's gradient to the raw product's.
float score_of(int row, int key, int masked, out float slope) {
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
  return s;
}

// The pair's weight. `norm`: two numbers whose sum is the row's log-sum-exp, see `norm_of` in backward_query.comp.
float weight_of(int row, int key, int masked, vec2 norm, out float slope) {
  const float s = score_of(row, key, masked, slope);
  return norm.x == -INFINITE || s == -INFINITE ? 0.0 : exp((s - norm.x) - norm.y);
}

float grad_of_weight(int row, int key) {
  vec4 sum = vec4(0.0);
  for (int d = 0; d < QUADS; d++) sum = fma(wide(grad_out[row * QUADS + d]), wide(values[key * QUADS + d]), sum);
  return sum.x + sum.y + sum.z + sum.w;
}
