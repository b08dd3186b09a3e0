// One step of a Ricci flow at a cell.
float next_phi(float here, float up, float down, float left, float right) {
  return here + p.dt * exp(-2.0 * here) * (up + down + left + right - 4.0 * here);
}
