"""The benchmark of memories compares what it says it compares, and overwrites nothing."""

import csv
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.benchmarks import (
    best_controller,
    conjpomdp,
    controllers,
    finite_memory,
    gamp_scale,
    gamp_variants,
    gpomdp_signal,
    gpomdp_variance,
    kstep,
    memory,
    offpolicy_times,
    outdegree,
    scaling,
    timing,
)
from spg.exact.enumeration import joint_chain
from spg.exact.exchange import average_reward
from spg.training import options
from spg.training.records import RunError
from spg.worlds import dense
from spg.worlds.problems import heaven_hell, load_unload, pentagon, tiger

TINY = memory.Config(
    cells=("linear",), windows=(), lengths=(), repeats=2, z_size=(4,), hidden=(8,), num_envs=2,
    num_steps=4, num_epochs=1, num_minibatches=2,
)  # fmt: skip
NAMES = ["none", "none-wide", "none-deep", "S2PG", "S2PG score", "BPTT-T", "BPTT-T associative"]


@pytest.mark.long
def test_measure_times_every_program_in_every_repeat():
    """One rollout serves both forms of BPTT."""
    names = ["S2PG", "BPTT-T", "BPTT-T associative"]
    compared = [m for m in memory.methods(TINY) if m.name in names]
    env_seconds, timings = memory.measure(TINY, compared)
    assert len(timings) == len(names)
    s2pg, bptt, associative = (t.rollout for t in timings)
    assert np.array_equal(bptt, associative)
    assert not np.array_equal(s2pg, bptt)
    for seconds in (env_seconds, *(x for t in timings for x in (t.rollout, t.training))):
        assert seconds.shape == (TINY.repeats,)
        assert (seconds > 0).all()


@pytest.mark.slow
def test_results_are_written_once_and_ratios_are_taken_within_repeats(tmp_path, monkeypatch):
    load = np.array([1.0, 7.0])  # a repeat in which the machine is busy leaves ratios alone
    timings = [memory.Timings(1.0, load, (i + 2) * load) for i in range(len(NAMES))]
    monkeypatch.setattr(memory, "measure", lambda config, compared: (load, timings))
    config = replace(TINY, out=str(tmp_path / "run"))
    rows = memory.main(config)
    with (tmp_path / "run" / "memory.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == NAMES
    assert (tmp_path / "run" / "memory.png").stat().st_size > 0
    bptt = rows[NAMES.index("BPTT-T")]
    assert bptt["training_to_none"] == bptt["training_to_none_q75"] == 7 / 2
    assert bptt["training_to_deep"] == 7 / 4
    assert bptt["training_to_s2pg"] == 7 / 5
    assert bptt["update_to_deep"] == (7 - 1) / (4 - 1)
    with pytest.raises(RunError, match="holds a run"):
        memory.main(config)


@pytest.mark.parametrize("cell", ["gru", "linear"])
def test_memoryless_references_do_as_many_multiply_adds_as_s2pg(cell):
    found = {m.name: m.config for m in memory.methods(memory.Config(cells=(cell,)))}
    count = memory.multiply_adds(found["S2PG"])
    by_hand = {"gru": 3 * 16 * (2 + 16), "linear": 16 * 2}[cell]  # 2 positions, z of 16
    by_hand += 64 * (18 + 2) + 64 * (18 + 1)  # head with two actions, critic
    assert count == by_hand
    for name in ("none-wide", "none-deep"):
        assert memory.multiply_adds(found[name]) == pytest.approx(count, rel=0.03)


@pytest.mark.slow
def test_every_cell_is_measured_with_each_size():
    config = replace(TINY, cells=("gru", "hybrid"), z_size=(32, 64))
    found = [m for m in memory.methods(config) if m.name == "BPTT-T"]
    pairs = [("gru", 32), ("gru", 64), ("hybrid", 32), ("hybrid", 64)]
    assert [(m.cell, m.z_size) for m in found] == pairs
    assert [(m.config.cell, m.config.z_size) for m in found] == pairs


def test_segment_lengths_must_divide_the_rollout(tmp_path):
    config = replace(TINY, lengths=(3,), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="does not divide num_steps 4"):
        memory.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_gamp_benchmark_compares_solvers_that_agree(tmp_path, monkeypatch, capsys):
    tiny = gamp_scale.Case(lambda: tiger().pomdp, 2, 2, num_seeds=1)
    monkeypatch.setitem(gamp_scale.CASES, "tiny", tiny)
    for method in ("arnoldi", "bicgstab"):  # to save compiling
        monkeypatch.delitem(gamp_scale.METHODS, method)
    config = gamp_scale.Config(
        parts=("solvers", "compare"), cases=("tiny",), tolerances=(1e-4, 1e-12), repeats=1,
        num_z=3, direct=(), iterative=(10,), out=str(tmp_path / "run"),
    )  # fmt: skip
    gamp_scale.main(config)
    read = lambda name: list(csv.DictReader((tmp_path / "run" / name).open(newline="")))
    errors = [float(row["error"]) for row in read("gamp_solvers.csv") if row["tol"] == "1e-12"]
    assert len(errors) == len(gamp_scale.METHODS) == 2
    assert max(errors) < 1e-9
    assert (tmp_path / "run" / "gamp_solvers.png").stat().st_size > 0
    scipy = read("gamp_scale.csv")
    assert [row["rival"] for row in scipy] == ["csr", "factors"]
    assert max(float(row[f"{who}_residual"]) for row in scipy for who in ("ours", "rival")) < 1e-8
    assert re.search(r"^tiny +8 +damped", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.long
def test_variants_of_the_solvers_solve_what_they_should(tmp_path):
    config = gamp_variants.Config(
        cases=("heavenhell",), repeats=1, steps=(0.1,), out=str(tmp_path / "run")
    )
    gamp_variants.main(config)
    rows = list(csv.DictReader((tmp_path / "run" / "gamp_variants.csv").open(newline="")))
    assert {row["variant"] for row in rows} == {*gamp_variants.VARIANTS, "cold", "warm"}
    assert max(float(row["residual"]) for row in rows) < 1e-8
    products = {row["variant"]: int(row["products"]) for row in rows}
    assert products["warm"] < products["cold"]


@pytest.mark.slow
def test_probability_to_stay_is_the_diagonal_of_the_chain():
    pomdp = load_unload().pomdp
    with jax.enable_x64(True):
        kernel = gamp_scale.controller(pomdp, 3, 2)
        joint = joint_chain(kernel, dense(pomdp))
        assert np.allclose(gamp_variants.stay(kernel, pomdp), jnp.einsum("sgsg->sg", joint))


def test_cost_of_an_error_is_read_off_between_two_tolerances():
    points = [{"products": n, "error": e} for n, e in ((10, 1e-3), (30, 1e-5), (50, 1e-7))]
    assert gamp_scale.cost(points, "products") == pytest.approx(40)
    assert np.isnan(gamp_scale.cost(points[:2], "products"))


@pytest.mark.parametrize("name", ["loadunload", "heavenhell", "pentagon", "factory"])
def test_controllers_are_trained_as_their_command_says(name):
    num_seeds, methods = controllers.task(name)
    assert num_seeds > 0
    for config in methods.values():
        assert options.parse(type(config), options.words(config)) == config


def test_controllers_that_were_trained_are_not_trained_again(tmp_path):
    config = controllers.gamp.Config()
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    (tmp_path / "summary.json").write_text('{"env_steps": 0}')
    assert controllers.train(config, tmp_path) == {"env_steps": 0}
    with pytest.raises(ValueError, match="was run with another costs"):
        controllers.train(replace(config, costs=(0.5, 1.0)), tmp_path)


def test_success_is_told_by_the_steps_of_the_first_and_the_last_seed():
    steps = np.array([10.0, 20.0, 3000.0])
    success = np.array([[False, True, False], [False, False, True], [False, False, False]])
    told = "some: 2 of 3 seeds earn half of the optimum, after 20 to 3,000 steps, median 1,510"
    assert controllers.tell_half("some", steps, success) == told
    told = "none: 0 of 3 seeds earn half of the optimum"
    assert controllers.tell_half("none", steps, np.zeros((3, 3), bool)) == told


@pytest.mark.long
def test_conjugate_gradients_learn_heaven_hell_by_the_exact_mean_of_the_estimates():
    for config in conjpomdp.methods().values():
        assert options.parse(type(config), options.words(config)) == config
    config = conjpomdp.methods()["exact-0.9"]
    config = replace(config, num_seeds=1, total_steps=60 * config.gradient_steps)
    trained = conjpomdp.by_the_mean(config)
    assert trained.met.shape == (1, 60)
    row = conjpomdp.row("exact-0.9", config, trained)
    assert 10 < int(row.first_above) < 60
    assert float(row.best_met) > 1 / 22


@pytest.mark.long
def test_expectation_over_istates_lowers_the_variance():
    config = gpomdp_variance.Config(
        num_controllers=1, num_runs=100, num_steps=100, stds=(0.5,), betas=(0.9,)
    )
    rows = gpomdp_variance.measure(config, load_unload())
    assert len(rows) == 12
    variance = {(r.estimator, r.baseline): r.variance for r in rows}
    for baseline in gpomdp_variance.BASELINES:
        assert variance["istate", baseline] > 5 * variance["exp", baseline]
    assert all(r.cosine > 0.8 for r in rows)


@pytest.mark.long
def test_what_an_istate_holds_gives_a_gradient_that_samples_can_see():
    config = gpomdp_signal.Config(
        num_z=8, num_controllers=2, num_runs=100, num_steps=200, starts=((0.0, 0.0), (0.0, 4.0)),
        along=(0.5,), betas=(0.9,),
    )  # fmt: skip
    plain, held, half = gpomdp_signal.measure(config, heaven_hell())
    assert held.gradient > 50 * plain.gradient
    assert held.istate < plain.istate / 1000
    assert held.cosine > 0.99
    assert half.average_reward > 0.02


@pytest.mark.long
def test_two_successors_find_what_one_and_all_do_not():
    config = outdegree.Config(num_seeds=4, num_updates=40)
    best = [
        np.median([row.average_reward for row in outdegree.train(config, "loadunload", k)])
        for k in (1, 3, 4)
    ]
    assert best[1] > 0.2 > max(best[0], best[2])


@pytest.mark.long
def test_the_search_for_the_best_controller_solves_load_unload():
    """Where no reward is negative the stages are alike, and every method ends at what is best."""
    config = best_controller.Config(num_seeds=2, num_random=1, num_updates=70, num_kicks=1)
    told = []
    with jax.enable_x64(True):
        world = dense(load_unload().pomdp)
        best = best_controller.search(config, world, 2, lambda *row: told.append(row))
        value = float(average_reward(best, world))
    assert [method for method, *_ in told] == [
        "gradients", "exchanged", "random", "both", "gradients", "exchanged", "both", "kicked",
        "best",
    ]  # fmt: skip
    assert value > 0.249


@pytest.mark.slow
def test_a_step_of_pentagon_is_worth_what_full_sight_earns():
    """.0503430 by value iteration elsewhere; bounds fall with the price of a step."""
    with jax.enable_x64(True):
        world = dense(pentagon().pomdp)
        found = best_controller.breakeven(world, best_controller.sighted)
        priced = best_controller.episode(world, 0.05)
        q, less = best_controller.sighted(priced), best_controller.informed(priced)
        assert np.isclose(found, 0.0503430, atol=1e-7)
        assert (less <= q + 1e-12).all()
        assert less[21].max() < q[21].max() - 0.01


@pytest.mark.long
def test_kstep_gradients_are_those_of_the_loops(tmp_path):
    """Dense loops over many worlds, and sparse ones in a large world, whose times are compared."""
    config = kstep.Config(num_worlds=3, bins=3, repeats=1)
    with jax.enable_x64(True):
        rows = kstep.many(config, tmp_path) + kstep.large(config, tmp_path)
    assert len(rows) == 7
    assert all(float(row["difference"]) < 1e-10 for row in rows)
    assert all(float(row["seconds"]) > 0 for row in rows)


TIMES = offpolicy_times.Config(
    tasks=("inverted_pendulum",), algorithms=("sac",), methods=("bptt-5-last",), hidden=(4,),
    z_size=2, num_envs=2, batch_size=8, single_batch_size=4, buffer_size=256, repeats=1,
)  # fmt: skip


@pytest.mark.long
def test_times_of_off_policy_training_are_of_every_method(tmp_path):
    rows = offpolicy_times.main(replace(TIMES, algorithms=("sac", "td3"), out=str(tmp_path)))
    named = [(row["algorithm"], row["method"]) for row in rows]
    assert named == [(a, m) for a in ("sac", "td3") for m in ("none", "bptt-5-last")]
    assert all(row[x] > 0 for row in rows for x in ("rollout_ms", "gradient_ms"))
    assert (tmp_path / "offpolicy_times.png").stat().st_size > 0


@pytest.mark.long
def test_finite_memories_earn_no_more_than_the_bounds_allow(tmp_path):
    config = finite_memory.Config(
        width=3, height=1, sizes=(1, 2), num_seeds=2, sampled_seeds=1, num_updates=100,
        controller_steps=5000, policy_steps=8192, eval_steps=50, num_beliefs=16,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = finite_memory.main(config)
    value = lambda method: [row["value"] for row in rows if row["method"] == method]
    (lower,), (upper,), (sight,) = (value(x) for x in ("PBVI, lower", "PBVI, upper", "full sight"))
    assert lower <= upper + 1e-9 <= sight + 2e-9
    found = np.array(value("GAMP") + value("IState-GPOMDP"))
    assert len(found) == 6
    assert (found <= upper + 1e-6).all()
    assert max(value("GAMP")) > 0.5 * lower
    assert {row["method"] for row in rows} >= set(finite_memory.POLICIES)


def test_what_is_in_the_table_of_finite_memories_is_not_measured_again(tmp_path, monkeypatch):
    """A run is cut short after GAMP with one I-state, and goes on."""
    done = []

    def row(method, num_z, value):
        done.append((method, num_z))
        of = {"method": method, "num_z": num_z or "", "seed": 0}
        return [{**of, "value": value, "noise_free": ""}]

    def jobs(config):
        for i, (method, num_z) in enumerate((("GAMP", 1), ("GAMP", 2), ("S2PG", None))):
            if i == 1 and len(done) == 1 and not config.resume:
                raise KeyboardInterrupt
            yield method, num_z, True, lambda m=method, n=num_z, i=i: row(m, n, 1.0 + i)

    monkeypatch.setattr(finite_memory, "jobs", jobs)
    config = finite_memory.Config(sizes=(1, 2), out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        finite_memory.main(config)
    rows = finite_memory.main(replace(config, resume=True))
    assert done == [("GAMP", 1), ("GAMP", 2), ("S2PG", None)]
    assert [row["value"] for row in rows] == [1, 2, 3]
    assert (tmp_path / "run" / "finite_memory.png").stat().st_size > 0
    with pytest.raises(RunError, match="another configuration"):
        finite_memory.main(replace(config, resume=True, slip=0.2))


def test_factors_are_taken_within_repeats_and_parts_fill_one_table(tmp_path):
    load = np.array([1.0, 7.0])
    seconds = {"none": np.outer([8, 1, 1, 1], load), "s2pg": np.outer([8, 1, 2, 3], load)}
    path = tmp_path / "times.csv"
    for task in ("ant", "hopper", "ant"):
        rows = offpolicy_times.tabulate(TIMES, "sac", task, seconds)
        rows = timing.merge(path, rows, columns=offpolicy_times.IDENTITY)
    assert [row["task"] for row in rows] == ["ant", "ant", "hopper", "hopper"]
    drawn = rows[1]
    assert drawn["method"] == "s2pg"
    assert drawn["to_none"] == drawn["to_none_q75"] == (8 + 32 * 2) / (8 + 32)
    assert drawn["single_to_none"] == (1 + 3) / (1 + 1)
    assert drawn["published_to_none"] == 2.241
    assert drawn["single_steps_per_second"] == 1 / (4 * 4)


def test_bptt_takes_whole_segments_or_as_many_sequences_as_the_batch_is_large():
    sizes = {
        method: offpolicy_times.training(offpolicy_times.Config(), "td3", "ant", method, 256).sample
        for method in ("bptt-5", "bptt-5-last")
    }
    assert sizes["bptt-5"] == {"num_segments": 51, "length": 5}
    assert sizes["bptt-5-last"] == {"num_segments": 256, "length": 5}


PROGRAM = """HloModule step
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%minibatch.1 (state: (s32[], f32[1,256,3])) -> (s32[], f32[1,256,3]) {
  %rows = (f32[1,256,3]{2,1,0}, s32[256]{0}) all-reduce(%x, %y), to_apply=%sum
  ROOT %t = (s32[], f32[1,256,3]) tuple(%i, %g)
}

%epoch (state: (s32[], f32[1,256,3])) -> (s32[], f32[1,256,3]) {
  ROOT %w = (s32[]) while(%s), body=%minibatch.1, config={"known_trip_count":{"n":"32"}}
}

%one (a: f32[]) -> f32[] {
  ROOT %r = c64[2] all-reduce(%a), to_apply=%sum
}

%search (state: (s32[])) -> (s32[]) {
  %mean = bf16[2] all-reduce-start(%x), to_apply=%sum
}

ENTRY %main (state: f32[3]) -> f32[3] {
  %w1 = (s32[]) while(%s), body=%epoch, config={"known_trip_count":{"n":"4"}}
  %w2 = (s32[]) while(%s), body=%search
  %f = f64[5]{0} all-gather(%s), dimensions={0}
  %c = f32[] conditional(%s), branch_computations={%one, %sum}
  %done = bf16[2] all-reduce-done(%mean)
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    """128 minibatches of 256 rows of three floats and an int; a mean; a branch; five doubles."""
    rows = 256 * 3 * 4 + 256 * 4
    assert scaling.sent(PROGRAM) == {
        "collectives": 131,
        "bytes": 128 * rows + 2 * 2 + 2 * 8 + 5 * 8,
    }


@pytest.mark.slow
def test_one_device_sends_nothing_and_is_timed(tmp_path, monkeypatch):
    small = {"num_steps": 4, "num_minibatches": 2, "cell": "linear", "z_size": 4, "hidden": (4,)}
    make = scaling.settings
    monkeypatch.setattr(scaling, "settings", lambda *words: replace(make(*words), **small))
    config = scaling.Config(
        algorithms=("ppo",), devices=(1,), num_envs=(4,), repeats=1, out=str(tmp_path / "run")
    )
    (row,) = scaling.main(config)
    assert (row["collectives"], row["bytes"]) == (0, 0)
    assert row["rollout_ms"] > 0
    with pytest.raises(ValueError, match="4 environments cannot be shared out evenly to 3 devices"):
        scaling.main(replace(config, devices=(3,), out=None))
