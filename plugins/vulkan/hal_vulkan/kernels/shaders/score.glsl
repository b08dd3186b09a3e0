// What hides and changes a score. GENERAL and the mask's buffer must be declared.

// The score of a row of a unit and a key from their product `x`; -infinity where the range or the band hide it. Without
// GENERAL the scale is left to `in_bits`. A finite mask value, however low, gives a finite score, which times log2(e) need
// not be finite: so scores are subtracted from each other before that factor.
float score(float x, int unit, int row, int key, ivec2 range) {
  const int i = row % p.len_q;
  if (GENERAL != 0) {
    x *= p.scale;
    if (p.softcap > 0.0) x = bounded_tanh(x / p.softcap) * p.softcap;
    if (p.has_mask != 0) x += mask[mask_row(unit, row) + min(key, p.len_k - 1)];
  }
  const bool seen = key >= max(i + p.lower, range.x) && key < min(min(i + p.upper + 1, p.len_k), range.y);
  return seen ? x : -INFINITE;
}

float natural() { return GENERAL != 0 ? 1.0 : p.scale; }  // factor from scores to natural units
float in_bits() { return natural() * LOG2E; }             // factor from differences of scores to powers of 2
