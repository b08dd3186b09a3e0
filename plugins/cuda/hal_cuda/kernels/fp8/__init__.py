"""Attention forward in FP8 (e4m3) for compute capability 9.0.

Conventions of a quantised tensor, the same for query, key and value, and the same as those of a scaled cache in
`SequenceMetadata`:

- Values are `torch.float8_e4m3fn`: finite, largest magnitude 448, rounded to nearest even, saturating.
- A scale is float32 and multiplies: x ~ x8.float() * scale. scale = max|x| / 448 over what shares it, at least
  2^-120; 1 where all is zero.
- Per head: scales are [batch, heads, 1], which broadcast as the [batch, heads, 1, 1] of a cache do. Per block: scales
  are [batch, heads, ceil(length / 128)], and scale b holds for tokens 128 b to 128 b + 127 of the head. The last block
  may be short. Heads are those of the tensor itself: key and value have heads_kv.
- Keys may be quantised with their mean over the tokens of a head subtracted. The softmax does not change; the
  log-sum-exp of a row then lacks scale * (query . mean), which the kernel adds where the log-sum-exp is asked for.
"""
