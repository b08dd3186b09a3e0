#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// Many steps of fields that one work group holds: it steps a field to the end, between the halves of its state. Work items
// walk as in ricci_flow_step.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width, repeats, fields; float dt; } p;
layout(binding = 0) readonly buffer Phi { float phi[]; };
layout(binding = 1) writeonly buffer Target { float target[]; };
layout(binding = 2) coherent buffer State { float state[]; };
#include "ricci.glsl"

void walk(int from, int to, int first, int last, int c) {
  const int left = c == 0 ? p.width - 1 : c - 1, right = c + 1 == p.width ? 0 : c + 1;
  float up = state[from + (first == 0 ? p.height - 1 : first - 1) * p.width + c];
  int row = from + first * p.width;
  float here = state[row + c];
  for (int y = first; y < last; y++) {
    const int below = y + 1 == p.height ? from : row + p.width;
    const float down = state[below + c];
    state[row - from + to + c] = next_phi(here, up, down, state[row + left], state[row + right]);
    row = below;
    up = here;
    here = down;
  }
}

// Two steps of K columns at a time, as in reaction_diffusion_steps.
const int K = 8;
void walk_twice(int from, int to, int first, int last, int c) {
  int column[K + 4];
  float up[K + 4], here[K + 4], down[K + 4], above[K + 2], middle[K + 2], below[K + 2];
  const int higher = from + (first - 2 + 2 * p.height) % p.height * p.width, high = from + (first - 1 + p.height) % p.height * p.width;
  [[unroll]] for (int j = 0; j < K + 4; j++) {
    column[j] = (c + j - 2 + 2 * p.width) % p.width;
    up[j] = state[higher + column[j]];
    here[j] = state[high + column[j]];
  }
  for (int y = first; y < last + 2; y++) { // loads row y, makes row y - 1 of the first step and row y - 2 of the second
    const int row = from + y % p.height * p.width, at = to + (y - 2) * p.width + c;
    [[unroll]] for (int j = 0; j < K + 4; j++) down[j] = state[row + column[j]];
    [[unroll]] for (int j = 0; j < K + 2; j++) below[j] = next_phi(here[j + 1], up[j + 1], down[j + 1], here[j], here[j + 2]);
    if (y >= first + 2) {
      [[unroll]] for (int j = 0; j < K; j++)
        if (c + j < p.width) state[at + j] = next_phi(middle[j + 1], above[j + 1], below[j + 1], middle[j], middle[j + 2]);
    }
    up = here;
    here = down;
    above = middle;
    middle = below;
  }
}

void main() {
  const int size = p.height * p.width, strips = max(THREADS / p.width, 1), rows = (p.height + strips - 1) / strips;
  const int id = int(gl_LocalInvocationID.x), strip = strips == 1 ? 0 : id / p.width, column = id - strip * p.width;
  for (int field = int(gl_WorkGroupID.z); field < p.fields; field += int(gl_NumWorkGroups.z)) {
    const int grid = field * size;
    int from = 2 * grid, to = from + size;
    for (int i = id; i < size; i += THREADS) state[from + i] = phi[grid + i];
    const int blocks = (p.width + K - 1) / K, parts = max(THREADS / blocks, 1), tall = (p.height + parts - 1) / parts;
    for (int left = p.repeats; left > 0; left -= left > 1 ? 2 : 1) {
      memoryBarrierBuffer();
      barrier();
      if (left > 1) {
        const int part = parts == 1 ? 0 : id / blocks;
        if (part < parts && part * tall < p.height)
          for (int c = id - part * blocks; c < blocks; c += THREADS)
            walk_twice(from, to, part * tall, min(part * tall + tall, p.height), K * c);
      } else if (strip < strips)
        for (int c = column; c < p.width; c += THREADS) walk(from, to, strip * rows, min(strip * rows + rows, p.height), c);
      const int other = from;
      from = to;
      to = other;
    }
    memoryBarrierBuffer();
    barrier();
    for (int i = id; i < size; i += THREADS) target[grid + i] = state[from + i];
  }
}
