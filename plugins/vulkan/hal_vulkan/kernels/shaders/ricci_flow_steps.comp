#version 450
// Many steps of fields that one work group holds: it steps a field to the end, from one set of buffers to the other.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width, repeats, fields; float dt; } p;
layout(binding = 0) readonly buffer Phi { float phi[]; };
layout(binding = 1) coherent buffer Target { float target[]; };
layout(binding = 2) coherent buffer Spare { float spare[]; };

// FROM: 0 the input, 1 target, 2 spare.
float get(int from, int i) { return from == 0 ? phi[i] : from == 1 ? target[i] : spare[i]; }

void element(int from, int to, int field, int y, int c) {
  const int grid = field * p.height * p.width, row = grid + y * p.width;
  const int up = grid + (y + p.height - 1) % p.height * p.width, down = grid + (y + 1) % p.height * p.width;
  const float here = get(from, row + c);
  const float neighbours = get(from, up + c) + get(from, down + c) + get(from, row + (c + p.width - 1) % p.width) + get(from, row + (c + 1) % p.width);
  const float next = here + p.dt * exp(-2.0 * here) * (neighbours - 4.0 * here);
  if (to == 1) target[row + c] = next;
  else spare[row + c] = next;
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
