#version 450
#extension GL_GOOGLE_include_directive : require
// Many steps of fields that one work group holds: it steps a field to the end, between the halves of its state. Work items
// walk as in reaction_diffusion_step.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes {
  int height, width, repeats, fields;
  float dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset;
} p;
layout(binding = 0) readonly buffer U { float u[]; };
layout(binding = 1) readonly buffer V { float v[]; };
layout(binding = 2) writeonly buffer TargetU { float target_u[]; };
layout(binding = 3) writeonly buffer TargetV { float target_v[]; };
layout(binding = 4) coherent buffer State { vec2 state[]; };
#include "reaction.glsl"

void walk(int from, int to, int first, int last, int c) {
  const int left = c == 0 ? p.width - 1 : c - 1, right = c + 1 == p.width ? 0 : c + 1;
  int row = from + (first == 0 ? p.height - 1 : first - 1) * p.width;
  vec2 up[3] = {state[row + left], state[row + c], state[row + right]};
  row = from + first * p.width;
  vec2 here[3] = {state[row + left], state[row + c], state[row + right]};
  for (int y = first; y < last; y++) {
    const int at = row - from + to + c;
    row = y + 1 == p.height ? from : row + p.width;
    const vec2 down[3] = {state[row + left], state[row + c], state[row + right]};
    const vec3 up_u = vec3(up[0].x, up[1].x, up[2].x), up_v = vec3(up[0].y, up[1].y, up[2].y);
    const vec3 here_u = vec3(here[0].x, here[1].x, here[2].x), here_v = vec3(here[0].y, here[1].y, here[2].y);
    const vec3 down_u = vec3(down[0].x, down[1].x, down[2].x), down_v = vec3(down[0].y, down[1].y, down[2].y);
    state[at] = vec2(next_u(up_u, here_u, down_u, here_v.y), next_v(up_v, here_v, down_v, here_u.y));
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
    for (int i = id; i < size; i += THREADS) state[from + i] = vec2(u[grid + i], v[grid + i]);
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
    for (int i = id; i < size; i += THREADS) {
      target_u[grid + i] = state[from + i].x;
      target_v[grid + i] = state[from + i].y;
    }
  }
}
