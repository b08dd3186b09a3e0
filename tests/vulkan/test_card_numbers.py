"""Which CUDA device is the same card as a Vulkan device, or why none is."""

from __future__ import annotations

import pytest

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import discovery  # noqa: E402

UUIDS = ["GPU-aaaa1111-2222-3333-4444-555555555555", "GPU-bbbb1111-2222-3333-4444-555555555555"]


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        (None, UUIDS),
        ("", []),
        ("1,0", UUIDS[::-1]),
        ("1", UUIDS[1:]),
        ("GPU-bb", UUIDS[1:]),
        ("GPU-", []),
        ("0,7,1", UUIDS[:1]),
        ("0,0", UUIDS[:1]),
        ("-1", []),
    ],
)
def test_cards_are_numbered_as_cuda_numbers_them(setting: str | None, want: list[str]) -> None:
    assert discovery._visible(UUIDS, setting) == want


def test_a_card_is_shared_with_the_cuda_device_of_its_uuid_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = next(iter(discovery.find().adapters.values()), None)
    if adapter is None:
        pytest.skip("no Vulkan device is here to be taken for another")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(discovery, "find_spec", lambda name: name)
    monkeypatch.setattr(discovery, "_uuids", lambda: UUIDS)
    both = frozenset({"memory_export", "timeline_export"})
    card = adapter._replace(vendor="NVIDIA", features=both, uuid=32 * "0" + "bbbb1111222233334444555555555555")
    assert discovery.cuda_index(card) == (1, "")
    assert discovery._describe("vulkan:0", card).reads == ("cpu", "cuda:1")
    reasons = [
        discovery.cuda_index(card._replace(vendor="AMD")),
        discovery.cuda_index(card._replace(features=frozenset())),
    ]
    reasons.append(discovery.cuda_index(card._replace(uuid=64 * "0")))
    monkeypatch.setattr(discovery, "_uuids", Failing(OSError("no such library")))
    reasons.append(discovery.cuda_index(card))
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    reasons.append(discovery.cuda_index(card))
    words = (
        "not a card of NVIDIA's",
        "exports no memory",
        "CUDA does not see this card",
        "no such library",
        "hal-vulkan[cuda]",
    )
    assert all(index is None and word in why for (index, why), word in zip(reasons, words, strict=True))
    shown = discovery._describe("vulkan:0", card)
    assert shown.reads == ("cpu",)
    assert any("no memory shared with CUDA: cuda-bindings is not installed" in feature for feature in shown.features)


class Failing:
    """Raises when it is called."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self) -> list[str]:
        raise self._error
