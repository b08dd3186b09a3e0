#version 450
#extension GL_GOOGLE_include_directive : require
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

void main() {
  const int size = p.height * p.width, strips = max(THREADS / p.width, 1), rows = (p.height + strips - 1) / strips;
  const int id = int(gl_LocalInvocationID.x), strip = strips == 1 ? 0 : id / p.width, column = id - strip * p.width;
  for (int field = int(gl_WorkGroupID.z); field < p.fields; field += int(gl_NumWorkGroups.z)) {
    const int grid = field * size;
    int from = 2 * grid, to = from + size;
    for (int i = id; i < size; i += THREADS) state[from + i] = phi[grid + i];
    for (int left = p.repeats; left > 0; left--) {
      memoryBarrierBuffer();
      barrier();
      if (strip < strips)
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
