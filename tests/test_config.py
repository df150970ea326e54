"""Every option composes with every other that a task takes with it; wrong ones are one sentence and leave nothing."""

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.config_checks import OWNED, READ_BY
from kvtuner_sglang.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load(*overrides: str):
    return command_line.load(overrides, CONF)


ONE_NODE = ("pp2", "single", "tp2")
PARALLEL = tuple(name for name in options("dist") if name != "single")
LOADS = ("capacity", "closed", "longctx", "multiturn", "open")
ONLY_FOR_SPEED = ("qwen2_5_7b_dummy", "tiny_dummy", "fp8")  # and task=serve: random weights, a peer
REFUSED = {"forensics": (*ONE_NODE, *LOADS, *ONLY_FOR_SPEED), "quality": (*PARALLEL, *ONLY_FOR_SPEED),
           "speed": PARALLEL, "agreement": (*PARALLEL, *ONLY_FOR_SPEED), "probe": ONLY_FOR_SPEED,
           "tune": ONLY_FOR_SPEED}  # {task: options of the groups that it reads}


def groups(task: str) -> list[str]:
    return [*(group for group in READ_BY[task] if (CONF / group).is_dir()), "tracking"]


def pairs(task: str) -> set[frozenset[tuple[str, str]]]:
    """Of the task itself and all that it takes: every two (group, option) that can be in one command line."""
    return {frozenset(pair) for g, h in itertools.combinations(["task", *groups(task)], 2)
            for pair in itertools.product([(g, a) for a in accepted(task, g)], [(h, b) for b in accepted(task, h)])}


def accepted(task: str, group: str) -> list[str]:
    return [task] if group == "task" else [name for name in options(group) if name not in REFUSED.get(task, ())]


def rows() -> list[dict[str, str]]:
    """A task and an option of every group that it reads a row, so few rows that each pair is in one of them."""
    of_task = {task: pairs(task) for task in READ_BY}
    left = set().union(*of_task.values())
    found = []
    for pair in sorted(left, key=sorted):
        if pair not in left:
            continue
        row = dict(sorted(pair))
        task = next(task for task in READ_BY if pair in of_task[task])
        for group in ("task", *groups(task)):
            if group not in row:
                row[group] = max(accepted(task, group), key=lambda name: sum(
                    frozenset({(group, name), other}) in left for other in row.items()))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        found.append({group: row[group] for group in ("task", *groups(task))})
    return found


def load_options(row: dict[str, str]):
    more = ["model.path=/checkpoint"] if row.get("model") == "local" else []
    more += ["plan.path=preset:qwen2_5_7b_kivi_3_18"] if row.get("quant") == "plan" else []
    return load(*(f"{group}={name}" for group, name in row.items()), *more)


@pytest.mark.parametrize("row", rows(), ids=lambda row: "-".join(row.values()))
def test_every_pair_of_options_composes(row):
    config = load_options(row)
    assert config.task == row["task"]
    for group in groups(row["task"]):
        name, found = row[group], getattr(getattr(config, group), "mode" if group == "tracking" else "name")
        assert found == (f"{name}_qwen2_5_7b_kivi_3_18" if (group, name) == ("quant", "plan") else name)


@pytest.mark.parametrize(("task", "group", "name"), [
    (task, group, name) for task in REFUSED for group in groups(task) for name in options(group)
    if name in REFUSED[task]])
def test_what_a_task_cannot_use_is_refused(task, group, name):
    row = {"task": task} | {other: accepted(task, other)[0] for other in groups(task)} | {group: name}
    with pytest.raises(ConfigError, match=f"task={task} |only task=speed"):
        load_options(row)


@pytest.mark.parametrize("name", options("exp"))
def test_every_job_of_an_experiment_composes(name):
    jobs = command_line.jobs([f"exp={name}"], CONF, multirun=True)
    assert len({load(*job).run_dir for job in jobs}) == len(jobs) >= 1


def test_the_ablation_is_every_format_on_every_topology():
    jobs = [load(*job) for job in command_line.jobs(["exp=ablation"], CONF, multirun=True)]
    assert {job.dist.name for job in jobs} == {"single", "tp2", "pp2", "tp2pp2"}
    assert {job.quant.name for job in jobs} == {"bf16", "kv8", "kv4", "kv2", "k8v4", "k4v2", "kv4_token"}
    assert len(jobs) == 4 * 7
    [one] = command_line.jobs(["exp=ablation", "dist=tp2", "quant=kv2"], CONF, multirun=False)
    assert (load(*one).dist.name, load(*one).quant.name, load(*one).workload.name) == ("tp2", "kv2", "ablation")


def test_the_ablation_on_a_gpu_is_every_format_in_the_same_bytes():
    jobs = [load(*job) for job in command_line.jobs(["exp=ablation_gpu"], CONF, multirun=True)]
    assert [job.quant.name for job in jobs] == ["bf16", "fp8", "kv8", "kv4", "kv2", "k8v4", "k4v2", "kv4_token"]
    [shared] = {(job.dist.name, job.server, job.workload.name, job.model.name, job.quality.probe) for job in jobs}
    assert shared == ("single", load("exp=ablation_gpu", "quant=kv4", "dist=single").server, "seed_report_gpu",
                      "qwen2_5_7b_dummy", False)
    assert (jobs[0].server.device, jobs[0].server.kv_gib) == ("cuda", 24)


@pytest.mark.parametrize("name", [name for name in options("quant") if name != "plan"])
def test_a_quant_file_is_what_its_name_says(name):
    quant = load(f"quant={name}").quant
    if name in ("bf16", "fp8"):
        assert not quant.enabled
        assert quant.kv_cache_dtype == {"bf16": "auto", "fp8": "fp8_e4m3"}[name]
        return
    base, _, suffix = name.partition("_")
    digits = base.replace("kv", "k").replace("v", "").replace("k", "")
    key, value = (digits[0], digits[-1])
    assert (quant.nbits_key, quant.nbits_value) == (int(key), int(value))
    if suffix == "token":
        assert quant.axis_key == 0


def test_runs_that_can_differ_get_different_directories():
    names = [
        load(*words).run_dir
        for words in (
            [],
            ["quant=kv8"],
            ["dist=pp2"],
            ["workload=seed_report"],
            ["server.kv_gib=0.5"],
            ["seed=1"],
            ["quant.asym=false"],
            ["quant.page_size=128"],
        )
    ]
    assert len(set(names)) == len(names)
    assert load("tracking=disabled", "force=true").run_dir == load().run_dir


PLAN = """model: {architecture: LlamaForCausalLM, layers: 2, kv_heads: 2, head_dim: 32}
default: {nbits_key: 8, nbits_value: 4, axis_key: 0}
layers: {1: {nbits_key: 4, nbits_value: 2, axis_key: 0}}
"""


def test_a_run_keeps_its_plan_and_is_named_by_it(tmp_path):
    def planned(name, text):
        (tmp_path / name).write_text(text)
        return load("quant=plan", f"plan.path={tmp_path / name}")

    config = planned("first.yaml", PLAN)
    assert [(fmt.key.bits, fmt.value.bits) for fmt in config.quant.plan(2)] == [(8, 4), (4, 2)]
    assert config.quant.page_tokens == 1
    assert config.quant.options().plan(2) == config.quant.plan(2)
    assert config.run_dir.name.startswith("serve-smollm2_135m-plan_first-single-smoke-")
    assert config.to_dict()["quant"]["plan_file"]["layers"]["1"]["nbits_value"] == 2
    (tmp_path / "elsewhere").mkdir()
    assert planned("elsewhere/first.yaml", PLAN).run_dir == config.run_dir
    assert planned("first.yaml", PLAN.replace("nbits_value: 2", "nbits_value: 4")).run_dir != config.run_dir
    (tmp_path / "first.yaml").unlink()
    assert config.quant.plan(2)[1].key.bits == 4, "a run does not read it a second time"


def test_a_plan_is_served_with_its_own_pages_and_under_its_own_name(tmp_path):
    def planned(*words, page=128, name="mine"):
        text = PLAN.replace("axis_key: 0", "axis_key: 1") + f"page_size: {page}\nname: {name}\n"
        (tmp_path / "plan.yaml").write_text(text)
        return load("quant=plan", f"plan.path={tmp_path / 'plan.yaml'}", *words).quant

    assert planned().page_tokens == planned("quant.page_size=128").page_tokens == 128
    assert planned().options().page_tokens(None) == 128
    assert planned(page=64).page_tokens == 64
    assert (planned().name, planned(name="other").name) == ("plan_mine", "plan_other")
    with pytest.raises(ConfigError, match=r"plan.yaml: the plan is for pages of 128 tokens .* leave --page-size"):
        planned("quant.page_size=64")
    with pytest.raises(ConfigError, match="choose 64 or 128"):
        planned(page=32)
    with pytest.raises(ConfigError, match=r"plan.yaml: name"):
        planned(name="a/b")


@pytest.mark.parametrize(("words", "part"), [
    (["quant=plan"], "quant=plan does not say how many bits: give plan.path=FILE"),
    (["plan.path=preset:qwen2_5_7b_kivi_3_18"], "plan.path is for quant=plan: give that, or leave plan.path out."),
    (["quant=kv8", "plan.path=preset:qwen2_5_7b_kivi_3_18"], "plan.path is for quant=plan"),
    (["quant=plan", "plan.path=/no/plan.yaml"], "/no/plan.yaml cannot be read"),
    (["quant=plan", "plan.path=preset:kv5"], "choose preset:NAME from"),
    (["quant=plan", "plan.path=preset:qwen2_5_7b_kivi_3_18", "quant.nbits_key=4"], "leave quant.nbits_key"),
    (["quant=plan", "plan.path=preset:qwen2_5_7b_kivi_3_18", "quant.axis_key=0"], "leave --kvtuner-axis-key"),
    (["quant=plan", "plan.path=preset:qwen2_5_7b_kivi_3_18", "quant.page_size=1"], "choose 64 or 128"),
])
def test_plans_that_cannot_be(words, part):
    with pytest.raises(ConfigError, match=part):
        load(*words)


@pytest.fixture
def sigterm_as_before() -> Iterator[None]:
    """command_line.check handles SIGTERM from then on, which the other tests of this process did not ask for."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["quant=kv3"], "choose from bf16"),
        (["quant.nbits_key=3"], "16, 8, 4 or 2"),
        (["quant.group_size=0"], "quant.group_size"),
        (["quant.axis_value=1"], "axis-value"),
        (["quant.page_size=32"], "64 or 128"),
        (["quant=bf16", "quant.page_size=64"], "leave quant.page_size=64 out"),
        (["dist.nnodes=2"], "cannot be shared by 2 nodes"),
        (["dist=tp2pp2", "dist.hosts=[127.0.0.1]"], "one per node"),
        (["server.kv_gib=-1"], "server.kv_gib"),
        (["server.context_length=100"], "server.context_length"),
        (["foo=1"], "no such option"),
        (["+quant.foo=1"], "quant.foo"),
        (["model=local"], "model.path"),
        (["task=fly"], "choose from"),
        (["report.language=fr"], "report.language"),
        (["report.language=zh", "task=quality"], "which task=quality does not write"),
        (["task=agreement", "model=tiny_dummy"], "random weights"),
        (["task=agreement", "dist=tp2"], "choose dist=single"),
        (["task=agreement", "agreement.dists=[tp4]"], "must name some of"),
        (["task=agreement", "agreement.prompt_tokens=2040"], "server.context_length"),
        (["task=agreement", "agreement.prompt_tokens=20", "quant.page_size=128"], "fills no page of 128"),
        (["task=agreement", "agreement.prompt_tokens=1", "quant=bf16"], "fills no page of 1 "),
        (["quant=kv4,kv8"], "add -m"),
        (["exp=ablation", "quant=kv4"], "add -m"),
        (["exp=ablation_gpu"], "add -m"),
        (["exp=oblation"], "choose from"),
        (["task=forensics", "dist=tp2pp2", "workload=open"], "is a load: choose workload=seed_report"),
        (["task=tune", "quant=kv4"], "task=tune does not read quant=kv4: leave it out"),
        (["task=tune", "server.kv_gib=1"], "task=tune does not read server.kv_gib=1"),
        (["task=quality", "workload=open"], "task=quality does not read workload=open"),
        (["task=speed", "workload.ttft.repeats=9"], "task=speed does not read workload.ttft.repeats=9"),
        (["task=probe", "dist=tp2"], "task=probe does not read dist=tp2"),
        (["task=kernels", "model=qwen2_5_7b"], "task=kernels does not read model=qwen2_5_7b"),
        (["task=paper", "quant=kv4"], "task=paper does not read quant=kv4"),
        (["tune=tiny"], "task=serve does not read tune=tiny"),
    ],
)
def test_wrong_options_are_one_sentence(words, part, tmp_path, monkeypatch, capsys, sigterm_as_before):
    """As run.py checks them first: see the next test."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command_line.check([f"runs_dir={tmp_path / 'runs'}", *words], CONF)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("kvtuner: ")
    assert said.err.count("\n") == 1
    assert part in said.err
    assert list(tmp_path.iterdir()) == []


def test_of_every_task_it_is_known_what_it_reads():
    assert sorted(READ_BY) == options("task")
    assert {key.partition(".")[0] for key in itertools.chain(*READ_BY.values())} == set(OWNED)


def test_a_bad_job_stops_a_sweep_before_its_first_job(tmp_path):
    words = ["-m", "quant=kv4,kv8", "server.kv_gib=0.5,-1", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, timeout=60,
                          cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("kvtuner: server.kv_gib")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_impossible_numbers_raise_for_library_users_too():
    with pytest.raises(ConfigError, match="nnodes divides"):
        load("dist=tp2", "dist.nnodes=3", "dist.hosts=[a,b,c]", "dist.http_ports=[0,0,0]")


def test_help_shows_the_groups_an_example_and_what_every_task_does():
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for text in ("quant=kv4 dist=tp2pp2", "kv2_token", "seed_report", "force=true"):
        assert text in done.stdout
    explained = done.stdout.partition("== task=... ==")[2].partition("== Groups")[0]
    assert not [task for task in options("task") if not re.search(rf"\b{task}\b.*  \w", explained)]


def test_the_layouts_of_an_agreement_are_the_options_of_dist():
    layouts = load("task=agreement").agreement.layouts
    assert layouts == {name: load(f"dist={name}").dist for name in options("dist") if name != "single"}
    assert [layouts[name].nnodes for name in load().agreement.dists] == [2, 2, 2]


def test_only_its_own_group_changes_the_folder_of_an_agreement():
    config, few = load("task=agreement"), load("task=agreement", "agreement.prompts=6")
    assert replace(config, workload=load("workload=seed_report").workload).run_dir == config.run_dir
    assert few.run_dir != config.run_dir
    assert replace(load(), agreement=few.agreement).run_dir == load().run_dir


def test_a_level_has_its_requests_or_its_rounds_if_those_are_more():
    load_of = load("workload=seed_report_gpu").workload.throughput
    assert [load_of.requests_at(n) for n in load_of.concurrency] == [6, 6, 8, 16, 32, 64, 128]
    assert load("workload=seed_report").workload.throughput.requests_at(8) == 16
