#version 450
// Many steps of fields that one work group holds: it steps a field to the end, from one set of buffers to the other.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes {
  int height, width, repeats, fields;
  float dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset;
} p;
layout(binding = 0) readonly buffer U { float u[]; };
layout(binding = 1) readonly buffer V { float v[]; };
layout(binding = 2) coherent buffer TargetU { float target_u[]; };
layout(binding = 3) coherent buffer TargetV { float target_v[]; };
layout(binding = 4) coherent buffer SpareU { float spare_u[]; };
layout(binding = 5) coherent buffer SpareV { float spare_v[]; };

// FROM: 0 the inputs, 1 target, 2 spare.
float get_u(int from, int i) { return from == 0 ? u[i] : from == 1 ? target_u[i] : spare_u[i]; }
float get_v(int from, int i) { return from == 0 ? v[i] : from == 1 ? target_v[i] : spare_v[i]; }

void element(int from, int to, int field, int y, int c) {
  const int grid = field * p.height * p.width, row = grid + y * p.width;
  const int up = grid + (y + p.height - 1) % p.height * p.width, down = grid + (y + 1) % p.height * p.width;
  const int left = (c + p.width - 1) % p.width, right = (c + 1) % p.width;
  // The nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle, periodic.
  const float a = get_u(from, row + c), b = get_v(from, row + c);
  const float spread_u = (get_u(from, up + c) + get_u(from, down + c) + get_u(from, row + left) + get_u(from, row + right)) / 6.0
                       + (get_u(from, up + left) + get_u(from, up + right) + get_u(from, down + left) + get_u(from, down + right)) / 12.0 - a;
  const float spread_v = (get_v(from, up + c) + get_v(from, down + c) + get_v(from, row + left) + get_v(from, row + right)) / 6.0
                       + (get_v(from, up + left) + get_v(from, up + right) + get_v(from, down + left) + get_v(from, down + right)) / 12.0 - b;
  const float next_u = a + p.dt * (p.diffusion_u * spread_u + p.reaction * (a - a * a * a - b));
  const float next_v = b + p.dt * (p.diffusion_v * spread_v + p.reaction * p.epsilon * (a - p.decay * b + p.offset));
  if (to == 1) {
    target_u[row + c] = next_u;
    target_v[row + c] = next_v;
  } else {
    spare_u[row + c] = next_u;
    spare_v[row + c] = next_v;
  }
}

void main() {
  for (uint field = gl_WorkGroupID.z; field < p.fields; field += gl_NumWorkGroups.z) {
    int from = 0;
    for (int left = p.repeats - 1; left >= 0; left--) {
      const int to = 1 + left % 2; // the last step writes the results
      for (int i = int(gl_LocalInvocationID.x); i < p.height * p.width; i += THREADS)
        element(from, to, int(field), i / p.width, i % p.width);
      memoryBarrierBuffer();
      barrier();
      from = to;
    }
  }
}
