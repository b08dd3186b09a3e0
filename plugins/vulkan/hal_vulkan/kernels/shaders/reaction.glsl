// One step of an activator and an inhibitor from a cell's rows above, its own and below: left, middle and right of each.
float spread(vec3 up, vec3 here, vec3 down) { // the nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle
  // Divided: a product with 1 / 12, rounded, would lose mass.
  return (2.0 * (up.y + down.y + here.x + here.z) + (up.x + up.z + down.x + down.z)) / 12.0 - here.y;
}
float next_u(vec3 up, vec3 here, vec3 down, float b) {
  const float a = here.y;
  return a + p.dt * (p.diffusion_u * spread(up, here, down) + p.reaction * (a - a * a * a - b));
}
float next_v(vec3 up, vec3 here, vec3 down, float a) {
  const float b = here.y;
  return b + p.dt * (p.diffusion_v * spread(up, here, down) + p.reaction * p.epsilon * (a - p.decay * b + p.offset));
}
