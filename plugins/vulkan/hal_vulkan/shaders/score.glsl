// What hides and changes a score. GENERAL and the mask's buffer must be declared.

// The score `x` of a row of a unit and a key, in powers of 2 where GENERAL; -infinity where the range or the band hide it.
float score(float x, int unit, int row, int key, ivec2 range) {
  const int i = row % p.len_q;
  if (GENERAL != 0) {
    x *= p.scale;
    if (p.softcap > 0.0) x = bounded_tanh(x / p.softcap) * (p.softcap * LOG2E);
    if (p.has_mask != 0) x += mask[mask_row(unit, row) + min(key, p.len_k - 1)] * LOG2E;
  }
  const bool seen = key >= max(i + p.lower, range.x) && key < min(min(i + p.upper + 1, p.len_k), range.y);
  return seen ? x : -INFINITE;
}

float in_bits() { return GENERAL != 0 ? 1.0 : p.scale; }  // factor from scores to powers of 2
