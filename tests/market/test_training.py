"""A fold's training: stopped and resumed to the bit, blind to what comes after, and able to learn what is planted."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fireflyer.checkpoint.hf import load_model
from fireflyer.config import load_config
from fireflyer.errors import Stopped, UserError
from fireflyer.market.baselines import fit_lightgbm
from fireflyer.market.features import bar_inputs, forward_returns, known_bars
from fireflyer.market.folds import Fold
from fireflyer.market.learning import BarLessons, balance_loss, draw
from fireflyer.market.model import MarketModel, new_network
from fireflyer.market.network import BarNetwork, month_blocks
from fireflyer.market.recipe import MarketRecipe, load_market_recipe
from fireflyer.market.synthetic import synthetic_panel
from fireflyer.market.training import train_fold
from fireflyer.model.routing import sequence_balance_loss

PANEL = synthetic_panel(5, days=220, names=24, signal=0.3, bars=False)
FOLD = Fold(slice(40, 150), slice(175, 220), purge=21, embargo=3)
SMALL = [
    "steps=4",
    "batch_size=16",
    "seq_len=40",
    "checkpoint_every=2",
    "threads=1",
    "schedule.warmup_steps=1",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.moe_intermediate_size=16",
    "model.n_routed_experts=4",
]


def recipe(*changes: str) -> MarketRecipe:
    return load_market_recipe(None, [*SMALL, *changes])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("market") / "fold"
    train_fold(PANEL, FOLD, recipe(), folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}


def test_a_stopped_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fold"
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="saved at step 3 of 4"):
        train_fold(PANEL, FOLD, recipe(), folder, should_stop=lambda: next(asked))
    train_fold(PANEL, FOLD, recipe(), folder)
    assert files(folder) == files(trained)
    losses = []
    for run in (folder, trained):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_training_reads_nothing_after_its_labels_end(trained: Path, tmp_path: Path) -> None:
    changed = PANEL.replace_future(FOLD.known_until - 1, "noise", np.random.default_rng(1))
    train_fold(changed, FOLD, recipe(), tmp_path / "fold")
    assert files(tmp_path / "fold") == files(trained)
    record = json.loads((trained / "fold.json").read_text())
    assert record["learned"]["labels_end"] == str(PANEL.dates[FOLD.known_until - 1]) < record["tested"]["from"]


def test_scaling_is_of_the_training_span_and_says_so(trained: Path) -> None:
    model = MarketModel.load(trained)
    assert isinstance(model.network, BarNetwork)
    seen = bar_inputs(PANEL).values[FOLD.train][known_bars(PANEL)[FOLD.train]].astype(np.float64)
    np.testing.assert_allclose(model.network.front_end.centre_F.numpy(), seen.mean(0), atol=1e-5)
    assert model.record["scaler"] == {"from": str(PANEL.dates[40]), "to": str(PANEL.dates[149])}


def test_labels_of_the_training_span_alone_are_learned_from() -> None:
    lessons = BarLessons(PANEL, FOLD, recipe())
    known = lessons.known_NDH.numpy()
    assert known[:, :40].sum() == known[:, 150:].sum() == 0
    label = forward_returns(PANEL, 20)[FOLD.train]
    assert known[:, FOLD.train, 2].sum() <= np.isfinite(label).sum()
    for step in range(50):
        window, names = draw(recipe(), FOLD.train, lessons.member_ND, step)
        assert window.start >= 24
        assert window.stop <= 150
        assert len(names) <= 16 == len(set(names.tolist()))


def test_a_finished_run_is_found_and_another_recipe_or_fold_refused(trained: Path) -> None:
    before = files(trained)
    train_fold(PANEL, FOLD, recipe(), trained)
    assert files(trained) == before
    with pytest.raises(UserError, match=r"another recipe: .*schedule.lr"):
        train_fold(PANEL, FOLD, recipe("schedule.lr=5e-4"), trained)
    with pytest.raises(UserError, match=r"market.burn_in: 16 -> 8"):
        train_fold(PANEL, FOLD, recipe("market.burn_in=8"), trained)
    with pytest.raises(UserError, match="another fold: learned"):
        train_fold(PANEL, Fold(slice(41, 150), FOLD.test, 21, 3), recipe(), trained)


def test_the_decoder_is_in_the_published_format(trained: Path) -> None:
    config = load_config(trained / "model")
    assert config.model_type == "deepseek_v3"
    assert config.num_nextn_predict_layers == 1
    model = MarketModel.load(trained / "model")
    ours, theirs = model.network.decoder.state_dict(), load_model(trained / "model").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("how", ["noise", "nan", "truncate"])
def test_forecasts_owe_nothing_to_the_future_to_the_bit(trained: Path, how) -> None:
    model = MarketModel.load(trained)
    whole = model.forecast(PANEL)
    for row in (77, 129, 200):
        changed = model.forecast(PANEL.replace_future(row, how, np.random.default_rng(row)))
        for ours, theirs in ((whole.scores, changed.scores), (whole.quantiles, changed.quantiles)):
            assert ours[: row + 1].tobytes() == theirs[: row + 1].tobytes()
        assert whole.expert_load[: row + 1].tobytes() == changed.expert_load[: row + 1].tobytes()
    assert np.isfinite(whole.scores[60:]).mean() > 0.6


def test_forecasts_do_not_depend_on_where_the_panel_begins_or_on_other_names(trained: Path) -> None:
    model = MarketModel.load(trained)
    whole, later = model.forecast(PANEL, first=170), model.forecast(PANEL.slice(60, 220), first=110)
    np.testing.assert_array_equal(whole.scores[170:], later.scores[110:])
    assert not np.isfinite(whole.scores[:170]).any()


def test_forecasts_are_where_a_member_trades_and_quantiles_ascend(trained: Path) -> None:
    out = MarketModel.load(trained).forecast(PANEL)
    there = np.isfinite(out.scores[..., 0])
    assert not (there & ~(PANEL.traded & PANEL.member)).any()
    assert (np.diff(out.quantiles[there], axis=-1) >= 0).all()
    loads = out.expert_load[np.isfinite(out.expert_load).all((1, 2))]
    np.testing.assert_allclose(loads.mean(-1), 1.0)
    assert loads.shape[1:] == (1, 4)


def test_a_panel_with_other_inputs_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match="no open"):
        MarketModel.load(trained).forecast(synthetic_panel(5, days=60, names=10))


def test_months_are_blocks() -> None:
    dates = np.array(["2021-01-28", "2021-01-29", "2021-02-01", "2021-02-02", "2021-03-01"], dtype="datetime64[D]")
    assert month_blocks(dates, 0) == [(0, 2), (2, 4), (4, 5)]
    assert month_blocks(dates, 3) == [(3, 4), (4, 5)]


def test_the_loss_is_the_sum_of_its_parts() -> None:
    settings = recipe("mtp.weight=0.3", "market.quantile_weight=0.7", "balance.sequence_alpha=0.2")
    lessons = BarLessons(PANEL, FOLD, settings)
    network = new_network(settings, list(lessons.input_names))
    part = lessons.part(network, 0, 0.3)
    values = {name: float(value.detach()) for name, value in part.values.items()}
    expected = values["loss"] + 0.7 * values["quantile_loss"] + 0.3 * values["mtp_loss"] + 0.2 * values["balance_loss"]
    assert float(part.loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert [routing.layer_index for routing in part.routing] == [1, 2]
    without = lessons.part(network, 0, 0.0)
    assert [routing.layer_index for routing in without.routing] == [1]
    assert float(without.values["loss"].detach()) == pytest.approx(values["loss"], rel=1e-6)
    layers = [sequence_balance_loss(r.scores_NE, r.shape_BT, 2) for r in part.routing]
    assert float(balance_loss(part.routing, 2).detach()) == pytest.approx(sum(float(x.detach()) for x in layers))


def test_it_learns_what_is_planted() -> None:
    """The made-up market pays for a fall over five days: after a few steps the training loss must have found it."""
    settings = recipe("steps=60", "schedule.lr=3e-3", "mtp.weight=0.0", "market.square_weight=0.0")
    lessons = BarLessons(PANEL, FOLD, settings)
    network = new_network(settings, list(lessons.input_names))
    lessons.set_scale_(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        part = lessons.part(network, step, 0.0)
        part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(part.values["loss"].detach()))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


# --- Recipes


def test_the_shipped_recipe_is_its_own_text(tmp_path: Path) -> None:
    shipped = load_market_recipe()
    (tmp_path / "recipe.toml").write_text(shipped.to_toml())
    assert load_market_recipe(tmp_path) == shipped
    assert shipped.differences(shipped) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("market.horizon=5", "unknown key horizon"),
        ("market.signal_horizon=7", "isn't among the horizons"),
        ("market.horizons=[5, 1]", "must ascend"),
        ("dtype=bf16", "dtype isn't for market models"),
        ("device=cuda", "device isn't for market models"),
        ("parallel.micro_batch_size=8", "parallel isn't for market models"),
        ("schedule.batch_start=8", "batch_start and schedule.batch_ramp_tokens go together"),
        ("epochs=2", "epochs isn't for market models"),
        ("seq_len=30", "too short"),
        ("market.burn_in", "not KEY=VALUE"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_market_recipe(None, [change])


_ELSEWHERE = """
import hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training import FOLD, PANEL, recipe
from fireflyer.market.baselines import fit_lightgbm
from fireflyer.market.training import train_fold
train_fold(PANEL, FOLD, recipe(), sys.argv[1])
print(hashlib.sha256(fit_lightgbm(PANEL, FOLD, 5).scores(PANEL).tobytes()).hexdigest())
"""


def test_another_process_trains_the_same_bits(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "fold"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert files(tmp_path / "fold") == files(trained)
    assert done.stdout.split() == [hashlib.sha256(fit_lightgbm(PANEL, FOLD, 5).scores(PANEL).tobytes()).hexdigest()]
