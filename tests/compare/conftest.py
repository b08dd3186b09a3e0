"""Devices with known errors and costs, and small models on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hal_core as hal  # noqa: E402
from hal_core import Capabilities, Causal, Device, Estimate, Fidelity, MaskKind, Numerics, Quantity, Range  # noqa: E402
from hal_core.plugin_api import current_meter  # noqa: E402


def build(kind: Any, config: Any, seed: int) -> Any:
    """A model with random weights."""
    torch.manual_seed(seed)
    return kind(copy.deepcopy(config)).eval()


class FakeDevice:
    """Torch attention, with relative noise of a known size, known seconds and joules per multiply-accumulate."""

    def __init__(
        self,
        name: str,
        fidelity: Fidelity = Fidelity.SIMULATED,
        *,
        noise: float = 0.0,
        seconds: float = 1e-12,
        joules: float | None = None,
        masks: frozenset[MaskKind] = frozenset(MaskKind),
        fails: bool = False,
        linear_error: float | None = None,
        compiles: str = "",
        count: int = 1,
        most_passes: int = 0,
    ) -> None:
        self.name, self.fidelity, self.noise, self.masks, self.fails = name, fidelity, noise, masks, fails
        self.seconds, self.joules, self.linear_error = seconds, joules, linear_error
        self.count, self.most_passes = count, most_passes
        self.features = (f"torch.compile {compiles}",) if compiles else ()
        if compiles and compiles not in torch._dynamo.list_backends():
            torch._dynamo.register_backend(lambda graph, example: self.compiled(graph, example), name=compiles)

    def devices(self) -> list[Device]:
        return [
            Device(
                id=f"{self.name}:{number}",
                family=self.name,
                vendor="test",
                model="fake",
                fidelity=self.fidelity,
                features=self.features,
            )
            for number in range(self.count)
        ]

    def compiled(self, graph: Any, example: Any) -> Any:
        """A compiler that runs the graph as it is, and says 1,000 multiply-accumulates and a quarter of a second."""

        @torch.compiler.disable
        def run(*inputs: Any) -> Any:
            start, result = perf_counter(), graph(*inputs)
            if (meter := current_meter()) is not None:
                stated = Quantity(0.25, 0.25, "modelled", "assumed", "a test")
                meter.add(self.devices()[0], perf_counter() - start, stated, None, 1000, 0)
            return result

        return run

    def kernel_names(self, device: Device) -> frozenset[str]:
        return frozenset() if self.linear_error is None else frozenset({"linear"})

    def linear(self, x: Any, weight: Any, bias: Any = None, *, passes: int = 1) -> Any:
        """The product with a relative error, and its seconds for the meter, those of all passes."""
        start, product = perf_counter(), torch.nn.functional.linear(x, weight)
        error = torch.randn(product.shape, generator=torch.Generator().manual_seed(1))
        product = product + (self.linear_error or 0.0) * product.norm() / error.norm() * error
        if (meter := current_meter()) is not None:
            macs = x.numel() * weight.shape[0]
            seconds = passes * macs * self.seconds
            stated = Quantity(seconds, seconds, "modelled", "paper-projection", "a test")
            meter.add(self.devices()[0], perf_counter() - start, stated, None, macs, 0)
        return product if bias is None else product + bias

    def capabilities(self, device: Device) -> Capabilities:
        numerics = {name: Numerics(relative=0.1, noisy=self.noise != 0) for name in ("float32", "bfloat16", "float16")}
        return Capabilities(
            dtypes=frozenset(numerics),
            numerics=numerics,
            head_dim=Range(1, 256),
            masks=self.masks,
            causal=frozenset({Causal.NONE, Causal.TOP_LEFT}),
            features=frozenset({"grouped_heads", "strides"}),
            options={"passes": Range(1, self.most_passes)} if self.most_passes else {},
        )

    def check(self, request: Any, device: Device) -> list[Any]:
        return []

    def estimate(self, request: Any, device: Device) -> Estimate:
        def stated(per_mac: float) -> Quantity:
            value = request.macs * per_mac * dict(request.options).get("passes", 1)
            return Quantity(value, value, "modelled", "paper-projection", "a test")

        return Estimate(time=stated(self.seconds), energy=None if self.joules is None else stated(self.joules))

    def open(self, device: Device) -> Any:
        session = hal.SimpleSession(None)
        session.kernel = lambda name: self.linear
        session.bind = lambda request: lambda q, k, v, mask, plan, tables, rng: self.run(request, q, k, v, mask, rng)
        return session

    def run(self, request: Any, q: Any, k: Any, v: Any, mask: Any, rng: Any) -> Any:
        if self.fails:
            raise RuntimeError("the fake device broke")
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        causal = request.causal is Causal.TOP_LEFT
        if causal and mask is not None:
            mask, causal = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), False
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=request.scale, is_causal=causal)
        if not self.noise:
            return out
        generator = torch.Generator().manual_seed((rng[0] + 7919 * rng[1]) % 2**62)
        noise = torch.randn(out.shape, generator=generator)
        return out + self.noise * out.norm() / noise.norm() * noise


@pytest.fixture
def device() -> Iterator[Callable[..., str]]:
    """Register a `FakeDevice` for the length of a test; gives its id."""
    names: list[str] = []

    def add(name: str, *args: Any, **kwargs: Any) -> str:
        hal.register(FakeDevice(name, *args, **kwargs))
        names.append(name)
        return f"{name}:0"

    yield add
    for name in names:
        hal.unregister(name)


class ProfiledDevice:
    """A backend that simulates from profiles, with the methods that a sweep asks for. A file holds its joules."""

    JOULES: ClassVar[dict[str, float]] = {"small": 1e-12, "small-fast": 2e-12, "large": 3e-12}

    def __init__(self, name: str, joules: float) -> None:
        self._made = FakeDevice(name, joules=joules)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def profile_names(self) -> list[str]:
        return list(self.JOULES)

    def at_profile(self, profile: str, name: str) -> ProfiledDevice:
        if not profile.endswith(".toml"):
            return ProfiledDevice(name, self.JOULES[profile])
        try:
            return ProfiledDevice(name, float(Path(profile).read_text()))
        except ValueError:
            raise hal.ContractError(f"{profile}: no number: give one") from None


@pytest.fixture
def profiled() -> Iterator[str]:
    """Register a `ProfiledDevice` for the length of a test; gives its id."""
    hal.register(ProfiledDevice("profiled", 1e-12), "profiled")
    yield "profiled:0"
    hal.unregister("profiled")


WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "from",
    "hounds",
    "to",
    "its",
    "den",
]


@pytest.fixture
def save_tokenizer() -> Callable[[Path], None]:
    """Write a tokenizer of `WORDS` into a folder."""
    return _save_tokenizer


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


@pytest.fixture
def encoder(tmp_path: Path, seed: int) -> Path:
    """The folder of a small BERT."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    folder = tmp_path / "encoder"
    build(transformers.BertModel, config, seed).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture
def decoder(tmp_path: Path, seed: int) -> Path:
    """The folder of a small Llama with grouped heads."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    folder = tmp_path / "decoder"
    build(transformers.LlamaForCausalLM, config, seed).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path, seed: int) -> Path:
    """A file of twelve texts of 3 to 14 words."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(12):
        order = torch.randperm(len(WORDS), generator=generator)[: 3 + number]
        lines.append(" ".join(WORDS[i] for i in order.tolist()))
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
