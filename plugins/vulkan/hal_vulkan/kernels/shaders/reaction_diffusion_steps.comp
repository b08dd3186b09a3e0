#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
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

// Two steps of K columns at a time: what lies between them stays in registers, and each value is loaded little more often
// than once for both. Its short loops must be unrolled: Mesa's CPU drivers leave every loop after 65,535 iterations in all.
const int K = 8;
vec2 next(vec2 a, vec2 b, vec2 c, vec2 d, vec2 e, vec2 f, vec2 g, vec2 h, vec2 i) { // three rows of three, e in the middle
  return vec2(next_u(vec3(a.x, b.x, c.x), vec3(d.x, e.x, f.x), vec3(g.x, h.x, i.x), e.y),
              next_v(vec3(a.y, b.y, c.y), vec3(d.y, e.y, f.y), vec3(g.y, h.y, i.y), e.x));
}
void walk_twice(int from, int to, int first, int last, int c) {
  int column[K + 4];
  vec2 up[K + 4], here[K + 4], down[K + 4], above[K + 2], middle[K + 2], below[K + 2];
  const int higher = from + (first - 2 + 2 * p.height) % p.height * p.width, high = from + (first - 1 + p.height) % p.height * p.width;
  [[unroll]] for (int j = 0; j < K + 4; j++) {
    column[j] = (c + j - 2 + 2 * p.width) % p.width;
    up[j] = state[higher + column[j]];
    here[j] = state[high + column[j]];
  }
  for (int y = first; y < last + 2; y++) { // loads row y, makes row y - 1 of the first step and row y - 2 of the second
    const int row = from + y % p.height * p.width, at = to + (y - 2) * p.width + c;
    [[unroll]] for (int j = 0; j < K + 4; j++) down[j] = state[row + column[j]];
    [[unroll]] for (int j = 0; j < K + 2; j++)
      below[j] = next(up[j], up[j + 1], up[j + 2], here[j], here[j + 1], here[j + 2], down[j], down[j + 1], down[j + 2]);
    if (y >= first + 2) {
      [[unroll]] for (int j = 0; j < K; j++)
        if (c + j < p.width)
          state[at + j] = next(above[j], above[j + 1], above[j + 2], middle[j], middle[j + 1], middle[j + 2], below[j], below[j + 1], below[j + 2]);
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
    for (int i = id; i < size; i += THREADS) state[from + i] = vec2(u[grid + i], v[grid + i]);
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
    for (int i = id; i < size; i += THREADS) {
      target_u[grid + i] = state[from + i].x;
      target_v[grid + i] = state[from + i].y;
    }
  }
}
