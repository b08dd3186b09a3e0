"""The search for the cheapest set of digital layers, on models whose answer is known."""

from __future__ import annotations

import pytest
from hal_nn.sensitivity import cheapest_digital_set, layer_damage, match_layers

from hal_core import ContractError

#: Work of each layer, and what its errors cost of a score of 1.
WORK = {"embed": 100, "block.0.up": 400, "block.0.down": 400, "block.1.up": 400, "block.1.down": 400, "head": 10}
HURT = {"embed": 0.30, "block.0.up": 0.01, "block.0.down": 0.20, "block.1.up": 0.01, "block.1.down": 0.02, "head": 0.05}


def score(digital: frozenset[str]) -> float:
    return 1 - sum(hurt for name, hurt in HURT.items() if name not in digital)


def test_the_set_keeps_the_score_with_the_least_digital_work() -> None:
    found = cheapest_digital_set(WORK, score, 0.9)
    assert found.layers == ("embed", "block.0.down")
    assert found.score == pytest.approx(0.91)
    assert found.digital_share == pytest.approx(500 / 1710)
    assert found.device_share == pytest.approx(1210 / 1710)
    assert found.tried <= 3 * len(WORK)


@pytest.mark.parametrize(("wanted", "layers"), [(0.1, ()), (0.4, ()), (0.7, ("embed",)), (1.0, tuple(WORK))])
def test_from_no_layer_to_all(wanted: float, layers: tuple[str, ...]) -> None:
    assert cheapest_digital_set(WORK, score, wanted).layers == layers


def test_a_score_that_digital_layers_do_not_reach_is_refused() -> None:
    with pytest.raises(
        ContractError, match=r"a score of 1\.5 was asked for: with every layer digital it is 1; ask for less"
    ):
        cheapest_digital_set(WORK, score, 1.5)
    with pytest.raises(ContractError, match="no layers were given"):
        cheapest_digital_set({}, score, 0.5)


def test_damage_is_that_of_a_layer_alone_and_may_be_finer_than_the_score() -> None:
    assert layer_damage(WORK, lambda digital: 1 - score(digital)) == pytest.approx(HURT)
    counted = cheapest_digital_set(WORK, lambda d: round(score(d), 1), 0.9, damage=lambda d: 1 - score(d))
    assert set(counted.layers) == {"embed", "block.0.down"}
    assert counted.damage == pytest.approx(HURT)


def test_names_and_patterns_find_layers_and_others_are_refused_with_the_closest() -> None:
    assert match_layers(list(WORK), ["head", "block.0.*"]) == {"head", "block.0.up", "block.0.down"}
    with pytest.raises(
        ContractError,
        match=r"layer 'block\.0\.upp' was given: there is none of that name; the closest are block\.0\.up",
    ):
        match_layers(list(WORK), ["block.0.upp"])
