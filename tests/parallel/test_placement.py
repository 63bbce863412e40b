"""Placements reproduce DeepSeek's published example, and keep their promises whatever the loads are."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.cli.main import main
from fireflyer.config.files import PRESETS
from fireflyer.errors import UserError
from fireflyer.parallel.placement import (
    Cluster,
    Placement,
    in_order,
    pack_evenly,
    place_experts,
    read_loads,
    replicate,
    run_loads,
)

# The example of EPLB's README: 2 layers of 12 experts in 4 groups, 16 replicas on 2 nodes with 4 GPUs each.
LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
PUBLISHED = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_example(layer):
    placed = place_experts(LOADS[layer], Cluster(slots=16, groups=4, nodes=2, ranks=8))
    assert placed.experts == PUBLISHED[layer]
    assert placed.imbalance(LOADS[layer]) < in_order(12, 4).imbalance(LOADS[layer])


def test_nodes_that_do_not_divide_the_groups_are_one_pool():
    by_hand = place_experts(LOADS[0], Cluster(16, 1, 1, 8))
    assert place_experts(LOADS[0], Cluster(16, 3, 2, 8)) == by_hand
    assert place_experts(LOADS[0], Cluster(16, 4, 2, 8)) != by_hand


@st.composite
def _clusters(draw):
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    ranks, experts = nodes * per_node, groups * size
    slots = -(-experts // ranks) * ranks + ranks * draw(st.integers(0, 2))
    loads = draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    return loads, Cluster(slots, groups, nodes, ranks)


@given(_clusters())
def test_every_expert_has_a_place_and_every_rank_as_many(drawn):
    loads, cluster = drawn
    placed = place_experts(loads, cluster)
    assert len(placed.experts) == cluster.slots == placed.slots_per_rank * cluster.ranks
    assert set(placed.experts) == set(range(len(loads)))
    assert sum(placed.rank_loads(loads)) == pytest.approx(sum(loads))
    assert placed.imbalance(loads) >= 1
    if cluster.groups % cluster.nodes == 0:
        size, on_node = len(loads) // cluster.groups, cluster.slots // cluster.nodes
        homes = {expert // size: set() for expert in range(len(loads))}
        for slot, expert in enumerate(placed.experts):
            homes[expert // size].add(slot // on_node)
        assert all(len(nodes) == 1 for nodes in homes.values())  # a group lies on one node
        assert len(set(Counter(node for (node,) in homes.values()).values())) == 1


@given(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.integers(0, 9))
def test_no_other_number_of_replicas_has_a_lower_highest_load(loads, more):
    counts = Counter(replicate(loads, len(loads) + more))
    highest = max(Fraction(load, counts[expert]) for expert, load in enumerate(loads))
    assert sum(load // highest + 1 for load in loads) > len(loads) + more  # slots for all replicas to have less


@given(st.lists(st.integers(0, 99), min_size=4, max_size=12).filter(lambda w: len(w) % 4 == 0))
def test_packs_are_equal_in_number_and_the_heaviest_items_lie_apart(weights):
    packs = pack_evenly(weights, 4)
    assert sorted(item for pack in packs for item in pack) == list(range(len(weights)))
    assert {len(pack) for pack in packs} == {len(weights) // 4}
    totals = [sum(weights[item] for item in pack) for pack in packs]
    assert max(totals) - min(totals) <= max(weights)


def test_tokens_are_spread_over_replicas_and_stay_where_they_were():
    placed = Placement((0, 1, 0, 2, 0, 1), ranks=3)
    assert placed.replicas == ((0, 2, 4), (1, 5), (3,))
    assert [placed.slot_of(0, token, rank=0) for token in range(4)] == [0, 4, 2, 0]  # 23333 = 2 (mod 3)
    assert placed.slot_of(0, 1, rank=1) == placed.replicas[0][(1 + 23333) % 3]
    used = Counter(placed.slot_of(0, token, rank=1) for token in range(300))
    assert set(used.values()) == {100}
    assert placed.rank_loads([3, 2, 5]) == [1 + 1, 1 + 5, 1 + 1]


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (Cluster(8, 4, 1, 2), "8 slots are fewer than the layer's 12"),
        (Cluster(16, 5, 1, 2), "5 groups don't divide 12 experts"),
        (Cluster(16, 4, 3, 8), "3 nodes don't divide 8 ranks"),
        (Cluster(14, 4, 1, 8), "8 ranks don't divide 14 slots; 16 would do"),
        (Cluster(16, 4, 0, 8), "nodes = 0"),
    ],
)
def test_refusals(cluster, said):
    with pytest.raises(UserError, match=said):
        place_experts(LOADS[0], cluster)


def test_loads_of_a_run_and_of_a_file(tmp_path):
    rows = [{"step": s, "load": {"1": [1.0 + s, 1.0 - s], "2": [1.0, 1.0]}, "bias": {}} for s in (0, 1)]
    assert run_loads(rows, last=2) == {1: [1.5, 0.5], 2: [1.0, 1.0]}
    assert run_loads(rows) == {1: [2.0, 0.0], 2: [1.0, 1.0]}
    path = tmp_path / "loads.json"
    path.write_text('{"4": [3, 4], "3": [1, 2]}')
    assert read_loads(path) == {3: [1.0, 2.0], 4: [3.0, 4.0]}
    for wrong in ('{"3": [1, -2]}', '{"3": [1], "4": [1, 2]}', "[1]", "{}", '{"a": [1]}', '{"3": [1, NaN]}'):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"loads\.json"):
            read_loads(path)
    with pytest.raises(UserError, match="no loads"):
        run_loads([])


@pytest.fixture
def shape(tmp_path):
    """A config.json of 12 experts in 4 groups, and a file with the example's loads."""
    config = json.loads((PRESETS / "deepseek-v3.json").read_text())
    config |= {"n_routed_experts": 12, "n_group": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "loads.json").write_text(json.dumps({"3": LOADS[0], "4": LOADS[1]}))
    return tmp_path


def test_the_command(shape, capsys):
    words = ["plan", str(shape), "--placement", str(shape / "loads.json"), "--count", "8", "--nodes", "2"]
    assert main([*words, "--redundant", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [tuple(layer["experts"]) for layer in facts["layers"].values()] == list(PUBLISHED)
    assert main([*words, "--redundant", "4"]) == 0
    assert "5 6 | 5 7 | 8 4" in capsys.readouterr().out
    assert main([*words, "--redundant", "3"]) == 2
    assert "8 ranks don't divide 15 slots; 16 would do" in capsys.readouterr().err
    assert main(["plan", str(shape), "--placement"]) == 2
    assert "no experts.jsonl" in capsys.readouterr().err
