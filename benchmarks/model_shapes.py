"""Shapes of attention in real models, for benchmarks: as they are trained."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One call of a model's training step.

    Attributes:
        mask: "" or what the model passes: "padding" (boolean, [batch, 1, 1, keys]), "bias" (additive, one for each
            head, with a gradient), "alibi" (additive, one for each head, causal inside, no gradient).
        window: keys to the left and right of a query that it reads; a left side alone goes with `causal`.
    """

    model: str
    batch: int
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int = 0
    causal: bool = False
    mask: str = ""
    window: tuple[int, int] | None = None
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def values(self) -> int:
        """Head size of the values."""
        return self.dim_v or self.dim

    def described(self) -> str:
        """In one cell of a table."""
        heads = f"{self.heads}/{self.heads_kv}" if self.heads != self.heads_kv else str(self.heads)
        lengths = f"{self.len_q}" if self.len_q == self.len_k else f"{self.len_q}x{self.len_k}"
        dims = f"{self.dim}/{self.values}" if self.dim != self.values else str(self.dim)
        extras = ["causal"] * self.causal + [self.mask] * bool(self.mask) + ["dropout"] * bool(self.dropout)
        extras += [f"window {max(self.window)}"] if self.window else []
        extras += [self.dtype] if self.dtype != "bfloat16" else []
        return " ".join([f"{self.batch} x {heads} x {lengths} x {dims}", *extras])


def _causal(model: str, heads: int, heads_kv: int, dim: int, *sizes: tuple[int, int]) -> list[Shape]:
    return [Shape(model, batch, heads, heads_kv, n, n, dim, causal=True) for batch, n in sizes]


def _full(model: str, heads: int, dim: int, *sizes: tuple[int, int, int]) -> list[Shape]:
    return [Shape(model, batch, heads, heads, len_q, len_k, dim) for batch, len_q, len_k in sizes]


SHAPES: tuple[Shape, ...] = (
    *_causal("Llama 3 8B", 32, 8, 128, (16, 512), (8, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)),
    *_causal("Llama 3 70B", 64, 8, 128, (1, 4096), (1, 8192)),
    *_causal("Llama 2 7B", 32, 32, 128, (4, 2048), (2, 4096)),
    *_causal("Llama 3.2 1B", 32, 8, 64, (4, 2048), (2, 8192)),
    *_causal("Qwen 2.5 7B", 28, 4, 128, (2, 4096), (1, 8192)),
    *_causal("Qwen 2.5 0.5B", 14, 2, 64, (8, 2048), (4, 4096)),
    *_causal("Qwen 3 0.6B", 16, 8, 128, (8, 2048)),
    *_causal("Gemma 3 4B", 8, 4, 256, (4, 2048), (2, 8192)),
    *_causal("Pythia 1B", 8, 8, 256, (8, 2048)),
    *_causal("GPT-2", 12, 12, 64, (16, 1024)),
    *_causal("GPT-2 XL", 25, 25, 64, (8, 1024)),
    *_causal("GPT-NeoX 20B", 64, 64, 96, (2, 2048)),
    *_causal("Phi 3 mini", 32, 32, 96, (4, 2048), (4, 4096)),
    *_causal("Phi 2", 32, 32, 80, (4, 2048)),
    *_causal("Falcon 7B", 71, 1, 64, (4, 2048)),
    *_causal("Whisper large, decoder", 20, 20, 64, (16, 448)),
    Shape("DeepSeek V3", 1, 128, 128, 4096, 4096, 192, 128, causal=True),
    Shape("DeepSeek V2 lite", 4, 16, 16, 2048, 2048, 192, 128, causal=True),
    Shape("Mistral 7B", 1, 32, 8, 8192, 8192, 128, causal=True, window=(4095, 0)),
    Shape("Gemma 3 4B, local", 2, 8, 4, 8192, 8192, 256, causal=True, window=(1023, 0)),
    Shape("Gemma 3 4B, local", 4, 8, 4, 2048, 2048, 256, causal=True, window=(1023, 0)),
    Shape("Gemma 3 27B, local", 1, 32, 16, 8192, 8192, 128, causal=True, window=(1023, 0)),
    Shape("ModernBERT, local", 4, 12, 12, 8192, 8192, 64, window=(64, 64)),
    *_full("ModernBERT", 12, 64, (4, 8192, 8192)),
    *_full("BERT base", 12, 64, (32, 512, 512)),
    *_full("BERT large", 16, 64, (16, 512, 512)),
    Shape("BERT base, padded", 32, 12, 12, 512, 512, 64, mask="padding"),
    Shape("BERT base, dropout", 32, 12, 12, 512, 512, 64, dropout=0.1),
    *_full("ViT B/16", 12, 64, (64, 197, 197)),
    *_full("ViT L/14", 16, 64, (64, 257, 257)),
    *_full("ViT H/14", 16, 80, (32, 257, 257)),
    *_full("SigLIP so400m", 16, 72, (16, 729, 729)),
    *_full("DINOv2 g/14", 24, 64, (8, 1370, 1370)),
    *_full("Whisper large, encoder", 20, 64, (8, 1500, 1500)),
    *_full("Whisper large, cross", 20, 64, (16, 448, 1500)),
    *_full("SD 1.5", 8, 40, (4, 4096, 4096), (4, 4096, 77)),
    *_full("SD 1.5, 32 x 32", 8, 80, (4, 1024, 1024)),
    *_full("SDXL", 10, 64, (4, 4096, 4096), (4, 4096, 77)),
    *_full("SDXL, 32 x 32", 20, 64, (4, 1024, 1024)),
    *_full("SD 3", 24, 64, (2, 4250, 4250)),
    *_full("Flux", 24, 128, (1, 4608, 4608)),
    *_full("DiT XL/2", 16, 72, (32, 256, 256)),
    *_full("Wan 2.1 14B", 40, 128, (1, 8192, 8192)),
    Shape("T5 base, encoder", 16, 12, 12, 512, 512, 64, mask="bias"),
    Shape("T5 large, encoder", 8, 16, 16, 512, 512, 64, mask="bias"),
    Shape("MPT 7B", 2, 32, 32, 2048, 2048, 128, mask="alibi"),
    Shape("Swin B", 1024, 4, 4, 49, 49, 32, mask="bias"),
    Shape("ViT B/16, float32", 16, 12, 12, 197, 197, 64, dtype="float32"),
    Shape("GPT-2, float32", 4, 12, 12, 1024, 1024, 64, causal=True, dtype="float32"),
)
