"""Tokens there and back, the two digits' losses by hand, and paths that the cache and no cache agree on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fireflyer.errors import UserError
from fireflyer.market import tokens
from fireflyer.market.features import SIGMA_FLOOR, log_returns
from fireflyer.market.folds import Fold
from fireflyer.market.model import MarketModel, new_network
from fireflyer.market.recipe import load_market_recipe
from fireflyer.market.synthetic import synthetic_panel
from fireflyer.market.tokens import (
    COARSE,
    FINE,
    REACH,
    TokenLessons,
    TokenNetwork,
    decode,
    encode,
    sample_scenarios,
    scaled_returns,
)
from fireflyer.market.training import train_fold

PANEL = synthetic_panel(6, days=150, names=16, bars=False)
FOLD = Fold(slice(30, 110), slice(135, 150), purge=21, embargo=3)
RECIPE = load_market_recipe(
    None,
    [
        "steps=3",
        "batch_size=8",
        "seq_len=40",
        "threads=1",
        "schedule.warmup_steps=1",
        "market.front_end=tokens",
        "model.hidden_size=32",
        "model.n_routed_experts=4",
    ],
)


def network() -> TokenNetwork:
    made = new_network(RECIPE, [])
    assert isinstance(made, TokenNetwork)
    return made


def test_a_token_is_the_return_to_within_its_cell() -> None:
    scaled = np.linspace(-REACH, REACH, 4001)
    coarse, fine = encode(scaled)
    assert coarse.min() == 0
    assert coarse.max() == COARSE - 1
    assert fine.min() == 0
    assert fine.max() == FINE - 1
    back = decode(torch.from_numpy(coarse), torch.from_numpy(fine)).numpy()
    width = 2 * np.arcsinh(REACH) / (COARSE * FINE) * np.sqrt(1 + scaled**2)  # a step of asinh, there
    assert (np.abs(back - scaled) <= 0.51 * width).all()
    assert (np.diff(coarse * FINE + fine) >= 0).all()


def test_what_lies_beyond_the_edges_is_in_the_outermost_cell() -> None:
    coarse, fine = encode(np.array([-99.0, 99.0]))
    assert coarse.tolist() == [0, COARSE - 1]
    assert fine.tolist() == [0, FINE - 1]


def test_edges_are_fixed_and_digits_causal() -> None:
    row = 100
    changed = PANEL.replace_future(row, "noise", np.random.default_rng(0))
    assert scaled_returns(changed)[: row + 1].tobytes() == scaled_returns(PANEL)[: row + 1].tobytes()
    lessons = TokenLessons(PANEL, FOLD, RECIPE)
    assert lessons.coarse_ND.shape[1] == FOLD.train.stop
    assert (
        lessons.sha256()
        == TokenLessons(PANEL.replace_future(109, "noise", np.random.default_rng(0)), FOLD, RECIPE).sha256()
    )


def test_the_loss_is_the_cross_entropy_of_both_digits() -> None:
    lessons, made = TokenLessons(PANEL, FOLD, RECIPE), network()
    part = lessons.part(made, 0, 0.3)
    from fireflyer.market.learning import draw

    window, names = draw(RECIPE, FOLD.train, lessons.member_ND, 0)
    coarse_loss, fine_loss, count = 0.0, 0.0, 0
    for name in names.tolist():
        days = [day for day in range(window.start, window.stop) if bool(lessons.there_ND[name, day])]
        coarse, fine = lessons.coarse_ND[name, days][None], lessons.fine_ND[name, days][None]
        hidden = made.decoder.trunk(inputs_embeds=made.embed(coarse, fine), num_mtp=0).hidden_BTD[0, :-1]
        logits = made.decoder.head(hidden)
        coarse_loss += float(F.cross_entropy(logits, coarse[0, 1:], reduction="sum").detach())
        fine_logits = made.fine_head(F.silu(hidden + made.coarse_condition(coarse[0, 1:])))
        fine_loss += float(F.cross_entropy(fine_logits, fine[0, 1:], reduction="sum").detach())
        count += len(days) - 1
    assert float(part.values["fine_loss"].detach()) == pytest.approx(fine_loss / count, rel=1e-4)
    assert float(part.values["loss"].detach()) == pytest.approx((coarse_loss + fine_loss) / count, rel=1e-4)


def test_paths_with_a_cache_are_those_of_reading_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest digit in place of a drawn one, so that both ways can be compared."""
    monkeypatch.setattr(tokens, "_drawn", lambda logits, generator: logits.argmax(-1))
    made, row, days, seq_len = network(), 140, 5, 140
    with torch.no_grad():
        for layer in made.decoder.model.layers:
            layer.self_attn.o_proj.weight.mul_(60)  # so that what is in the cache decides
    held = np.isfinite(scaled_returns(PANEL))[: row + 1].sum(0)
    different = np.unique(held, return_index=True)[1][[0, 1, -1]]  # names with histories of other lengths
    symbols = tuple(PANEL.symbols[name] for name in different)
    drawn = sample_scenarios(made, PANEL, row, symbols=symbols, days=days, num_paths=2, seq_len=seq_len)
    for place, symbol in enumerate(symbols):
        column = PANEL.symbols.index(symbol)
        scaled = scaled_returns(PANEL)[: row + 1, column]
        digits = encode(scaled[np.isfinite(scaled)][-(seq_len - days) :])
        coarse, fine = (torch.from_numpy(digit)[None] for digit in digits)
        own = log_returns(PANEL)[: row + 1, column]
        recent = list(own[np.isfinite(own)][-20:])
        total = 0.0
        for day in range(days):
            with torch.no_grad():
                hidden = made.decoder.trunk(inputs_embeds=made.embed(coarse, fine), num_mtp=0).hidden_BTD[:, -1]
                next_coarse = made.decoder.head(hidden).argmax(-1)
                next_fine = made.fine_logits(hidden, next_coarse).argmax(-1)
            sigma = max(float(np.sqrt(np.mean(np.square(recent[-20:])))), SIGMA_FLOOR)
            move = float(decode(next_coarse, next_fine)) * sigma
            recent.append(move)
            total += move
            assert drawn.paths[place, :, day] == pytest.approx([total, total], rel=1e-4)
            coarse, fine = (
                torch.cat((old, new[None]), dim=1) for old, new in ((coarse, next_coarse), (fine, next_fine))
            )


def test_paths_are_the_seeds_and_owe_nothing_to_the_future() -> None:
    made = network()
    arguments = {"symbols": PANEL.symbols[:2], "days": 4, "num_paths": 6, "seq_len": 40}
    first = sample_scenarios(made, PANEL, 120, **arguments)
    later = PANEL.replace_future(120, "nan", np.random.default_rng(0))
    assert sample_scenarios(made, later, 120, **arguments).paths.tobytes() == first.paths.tobytes()
    assert sample_scenarios(made, PANEL, 120, seed=1, **arguments).paths.tobytes() != first.paths.tobytes()
    assert first.paths.shape == (2, 6, 4)


def test_a_token_model_trains_saves_and_loads(tmp_path: Path) -> None:
    model = train_fold(PANEL, FOLD, RECIPE, tmp_path / "tokens")
    again = MarketModel.load(tmp_path / "tokens")
    ours, theirs = model.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="gives scenarios"):
        again.forecast(PANEL)


def test_too_long_a_path_and_too_short_a_history_are_refused() -> None:
    with pytest.raises(UserError, match="can write 20"):
        sample_scenarios(network(), PANEL, 120, symbols=PANEL.symbols[:1], days=30, num_paths=1, seq_len=40)
    with pytest.raises(UserError, match="bars by"):
        sample_scenarios(network(), PANEL, 5, symbols=PANEL.symbols[:1], days=3, num_paths=1, seq_len=40)
