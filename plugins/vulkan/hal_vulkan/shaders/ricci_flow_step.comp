#version 450
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width; float dt; } p;
layout(binding = 0) readonly buffer Phi { float phi[]; };
layout(binding = 1) writeonly buffer Next { float next[]; };

void main() {
  const int c = int(gl_GlobalInvocationID.x), y = int(gl_WorkGroupID.y);
  if (c >= p.width) return;
  const int grid = int(gl_WorkGroupID.z) * p.height * p.width, row = grid + y * p.width;
  const int up = grid + (y + p.height - 1) % p.height * p.width, down = grid + (y + 1) % p.height * p.width;
  const float here = phi[row + c];
  const float neighbours = phi[up + c] + phi[down + c] + phi[row + (c + p.width - 1) % p.width] + phi[row + (c + 1) % p.width];
  next[row + c] = here + p.dt * exp(-2.0 * here) * (neighbours - 4.0 * here);
}
