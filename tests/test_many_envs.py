"""Thousands of environments: settings, and the GPU's benchmark."""

import csv
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import scripts.benchmarks.many_envs as many_envs  # it puts scripts/ on the path
from scripts.benchmarks import curves, gpu
from spg.limits import check

ppo = curves.ppo
TINY = ppo.Config(
    env="RepeatFirst-memory", observe="all", env_params={"delay": 0.0}, total_steps=48, num_envs=6,
    num_steps=4, num_minibatches=2, num_epochs=1, cell="linear", z_size=2, hidden=(3,),
    eval_episodes=2,
)  # fmt: skip


@pytest.mark.parametrize("task", ["cartpole", "recall10", "pendulum", "pointmass"])
def test_settings_of_many_environments_can_train(task):
    """With 64 they are the task's own, and with more no batch, buffer or minibatch is too small."""
    name = many_envs.algorithm_of(task)
    assert many_envs.setting(task, 64) == curves.task(task, name)[0]
    for num_envs in (1024, 4096, 16384):
        config = many_envs.setting(task, num_envs, num_seeds=1)
        algorithm = curves.SCRIPTS[name].make(config)
        assert algorithm.num_updates >= 64
        if name == "sac":  # as many samples for a step of an environment
            samples = config.num_gradients * config.batch_size / config.rollout_size
            assert samples == 32


def test_tasks_are_settings_of_the_script_that_trains_them():
    for algorithm, script in curves.SCRIPTS.items():
        name = "size" if algorithm in curves.IMITATION else "pendulum"
        config, methods = curves.task(name, algorithm)
        assert type(config) is script.Config
        for words in methods.values():
            check(replace(config, **words))
    assert "S2PG score" not in curves.task("pendulum", "reppo")[1]
    with pytest.raises(ValueError, match="'ant' is not for gail; choose from size, payload"):
        curves.task("ant", "gail")


@pytest.mark.long
def test_a_training_counts_what_its_environments_carry(tmp_path, monkeypatch):
    monkeypatch.setattr(many_envs, "setting", lambda task, n, **new: replace(TINY, **new))
    config = many_envs.Config(tasks=("recall10",), num_envs=(6,), train=True, out=str(tmp_path))
    (row,) = many_envs.main(config)
    assert row["updates"] == 2
    assert row["sequential"] == 2 * (4 + 2)
    assert 0 < row["carried_kb"] < row["update_kb"]
    assert -1 <= row["sampled"] <= 1
    assert (tmp_path / "many_envs_trained.csv").stat().st_size > 0


BENCHMARK = gpu.Config(
    num_envs=(6,), methods=("s2pg",), repeats=2, learn_seconds=0.0, episodes=2, lengths=(4,),
    numbers=64, width=4, states=(128,),
)  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """`gpu.work` on tiny sizes, in this process."""
    monkeypatch.setattr(many_envs, "setting", lambda task, n, memory, **new: replace(TINY, **new))
    monkeypatch.setattr(gpu.scans, "bandwidth", lambda: 1e9)

    def run(part, deadline=np.inf, config=BENCHMARK):
        rows = []
        gpu.work(config, part, deadline, rows.extend)
        return rows

    return run


@pytest.mark.long
def test_every_part_of_the_gpu_benchmark_is_measured(measured):
    """Each case has times of running, the time to compile apart from them, and the device."""
    (trained,) = measured("recall10")
    assert trained["steps"] == 2 * 6 * 4  # both updates
    assert trained["steps_per_s"] > 0
    rows = measured("scans")
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all(row["auto_of_copy"] > 0 for row in rows)
    found = measured("gamp")
    assert {row["world"] for row in found} == {"random", "local"}
    assert all(row["gradient_s"] > 0 and row["joint_states"] == 1024 for row in found)
    for row in (trained, *rows, *found):
        assert "note" not in row
        assert row["compile_s"] > 0
        assert row["device"] == jax.devices()[0].device_kind


def test_a_failure_is_told_and_the_next_case_is_measured(measured, monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand a long dump")

    def cases(config):
        yield {"size": 2}, fail
        yield {"size": 1}, lambda: [{"seconds": 3.0}]

    monkeypatch.setitem(gpu.PARTS, "scans", (1.0, cases))
    failed, row = measured("scans")
    assert failed["note"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert row["seconds"] == 3.0


def test_cases_without_time_are_named(measured):
    assert [row["note"] for row in measured("gamp", deadline=0.0)] == ["skipped: no time"] * 2


def test_the_benchmark_ends_in_time_and_writes_what_it_has(tmp_path, capsys, monkeypatch):
    """A process that has no time to start is ended, and its cases are rows all the same."""

    def supervise(config, part, deadline, end, take):
        if part == "gamp":  # for real
            return original(config, part, deadline, end, take)
        take([{"size": 1, "seconds": 0.5, "seconds_q25": 0.4}])

    original = gpu.supervise
    monkeypatch.setattr(gpu, "supervise", supervise)
    out = tmp_path / "run"
    began = time.monotonic()
    config = replace(BENCHMARK, parts=("scans", "gamp"), minutes=0.5 / 60, out=str(out))
    gpu.main(config)
    assert time.monotonic() - began < 5
    read = lambda part: list(csv.DictReader((out / f"{part}.csv").open(newline="")))
    assert read("scans") == [{"size": "1", "seconds": "0.5", "seconds_q25": "0.4"}]
    assert [row["note"] for row in read("gamp")] == ["skipped: the time was up"] * 2
    text = (out / "gpu.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("| size | seconds |\n| --- | --- |\n| 1 | 0.5 |\n")
