#version 450
// Each invocation adds every stride-th element, with the rounding error carried along (Kahan 1965).
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int count; } p;
layout(binding = 0) readonly buffer X { float x[]; };
layout(binding = 1) writeonly buffer Parts { float parts[]; };

void main() {
  precise float sum = 0.0, lost = 0.0;
  for (int n = int(gl_GlobalInvocationID.x); n < p.count; n += int(gl_NumWorkGroups.x) * THREADS) {
    precise float next = x[n] - lost;
    precise float now = sum + next;
    lost = (now - sum) - next;
    sum = now;
  }
  parts[gl_GlobalInvocationID.x] = sum;
}
